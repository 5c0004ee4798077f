#include "experiments/sweep_schema.h"

#include <map>
#include <set>
#include <stdexcept>

namespace mixlora {
namespace {

/// What each field means, by its path in the file.
const std::map<std::string, const char*>& descriptions() {
  static const std::map<std::string, const char*> kTexts{
      {"$schema", "Where this schema is, for editors; not read."},
      {"name", "Names the store (runs/NAME.db) and its tables."},
      {"model",
       "A Hugging Face directory (config.json, *.safetensors, tokenizer.json), or "
       "shape:NAME for random weights of a known shape."},
      {"base", "Every trial starts from this."},
      {"axes", "The trials are the product of the axes' values, in the order written."},
      {"axes.name", "Names the axis in labels, when and exclude."},
      {"axes.path",
       "Shorthand: JSON pointer to the one field that the values are for, such as "
       "/train/seed."},
      {"axes.when", "Only trials with these labels of earlier axes take this axis."},
      {"axes.values",
       "Labelled merge patches {\"label\": ..., ...} (RFC 7396; null goes back to "
       "the default), or plain values for `path`."},
      {"include", "Single trials added to the product: labelled merge patches on base."},
      {"exclude", "Trials taken away: every rule's labels must match."},
      {"run", "How to run; not part of a trial but for the precision."},
      {"tables", "Tables printed and written after the run; empty: all."},
      {"run.device", "auto takes the GPU where the program has CUDA and a device is there."},
      {"run.precision", "Type of the frozen matrix products; auto: bf16 where the device has it."},
      {"run.memory_limit_gib", "Most memory a step may take; null: what the device has."},
      {"run.recompute",
       "What backward computes again to save memory; auto: the cheapest that "
       "fits."},
      {"run.pack",
       "Trials trained in one step over one base: auto (GPU: as many as fit, at most "
       "8; CPU: off), off, or at most so many."},
      {"run.keep_adapters", "Write trained adapters to runs/NAME-adapters/KEY."},
      {"run.save_every_seconds",
       "Seconds of training between two saved states that a killed run goes on from; 0: none."},
      {"adapter", "What is trained."},
      {"adapter.method", "base asks the untrained model."},
      {"adapter.r", "Rank."},
      {"adapter.lora_alpha", "The update is scaled by lora_alpha / r."},
      {"adapter.lora_dropout", "Dropout of the adapter's input while training."},
      {"adapter.target_modules", "Projections that are adapted."},
      {"adapter.use_rslora", "Scale by lora_alpha / sqrt(r)."},
      {"adapter.lora_init", "How A starts; B starts at zero."},
      {"adapter.routing_strategy",
       "top-k (mixlora), top-p (mixlora-dynamic) or top-1 with "
       "capacity (mixlora-switch)."},
      {"adapter.num_experts", "Experts of each feed-forward block."},
      {"adapter.top_k", "Experts a token uses (mixlora)."},
      {"adapter.top_p", "Experts up to this probability (mixlora-dynamic)."},
      {"adapter.temperature", "Divides the probabilities of mixlora-dynamic; 0: off."},
      {"adapter.router_init_range",
       "Standard deviation of the router's start; null: 0.02, switch "
       "1.0."},
      {"adapter.jitter_noise",
       "Relative noise on the router's input while training; null: 0, "
       "switch 0.01."},
      {"adapter.router_loss", "Train the router with its auxiliary losses."},
      {"adapter.router_aux_loss_coef", "Weight of the balance loss."},
      {"adapter.router_aux_loss_scope", "Balance over all layers together, or each layer alone."},
      {"adapter.router_z_loss_coef", "Weight of the z loss (mixlora-switch)."},
      {"adapter.expert_capacity", "Tokens an expert takes from one sequence (mixlora-switch)."},
      {"adapter.overflow",
       "What a token over capacity gets: the frozen block's output, or its own "
       "input."},
      {"adapter.ffn_dropout", "Dropout of the feed-forward output while training."},
      {"adapter.act_fn", "Another activation than the model's own; it changes the base model too."},
      {"adapter.expert_lora", "The experts' own LoRA numbers; absent ones are the adapter's."},
      {"adapter.expert_lora.r", "Rank of each expert."},
      {"adapter.expert_lora.lora_alpha", "Scale of each expert."},
      {"adapter.expert_lora.lora_dropout", "Dropout of each expert's input."},
      {"adapter.expert_lora.use_dora", "Magnitudes in the experts."},
      {"train", "How it is trained."},
      {"train.tasks", "Suites whose train splits are learned, together: a list, or \"a;b;c\"."},
      {"train.optim", "Optimizer."},
      {"train.lr", "Learning rate."},
      {"train.loraplus_lr_ratio", "LoRA+: B and magnitudes learn this much faster."},
      {"train.momentum", "Of sgd."},
      {"train.weight_decay", "Decoupled weight decay."},
      {"train.scheduler_type", "How the learning rate changes over the steps."},
      {"train.warmup_steps", "Steps of linear warm-up."},
      {"train.warmup_ratio", "Warm-up as a share of all steps; warmup_steps goes first."},
      {"train.num_epochs", "Times the data is seen, shuffled anew each time."},
      {"train.max_steps", "Ends training earlier; 0: by epochs."},
      {"train.batch_size", "Samples an optimizer step."},
      {"train.micro_batch_size", "Samples a pass; 0: batch_size. Changes memory, not the result."},
      {"train.group_by_length", "Batches of samples of like length."},
      {"train.cutoff_len", "Tokens of a sample; the prompt's middle is cut."},
      {"train.max_grad_norm", "Clips the gradient's norm; 0: off."},
      {"train.train_on", "Learn every token, or the answer's alone."},
      {"train.limit", "First n samples of every task; 0: all."},
      {"train.seed", "Of everything random: initial weights, order, dropout."},
      {"evaluate", "What the trained model is asked."},
      {"evaluate.suites", "Suites whose test splits are asked: a list, or \"a;b;c\"."},
      {"evaluate.protocol", "How a suite is asked and scored."},
      {"evaluate.label_rule",
       "label-token: the row's own labels compete, or the task's whole list as in MoE-PEFT."},
      {"evaluate.boolq_passage", "label-token: put the passage before BoolQ's question."},
      {"evaluate.bos", "Texts begin with BOS as the tokenizer has it, or never."},
      {"evaluate.few_shot", "loglikelihood: solved examples before each question."},
      {"evaluate.limit", "First n rows of every suite; 0: all."},
      {"evaluate.cutoff_len", "Tokens of a prompt; its middle is cut."},
  };
  return kTexts;
}

std::vector<std::string> projections() {
  std::vector<std::string> names;
  for (std::size_t p = 0; p < kProjections; ++p)
    names.emplace_back(name_of(static_cast<Projection>(p)));
  return names;
}

// Fields with a reader of their own say here what they take.
Json form(const Targets&) {
  const Json name = {{"enum", projections()}};
  return {{"anyOf",
           {{{"const", "all-linear"}},
            {{"type", "array"}, {"items", name}},
            {{"type", "object"},
             {"propertyNames", name},
             {"additionalProperties", {{"type", "boolean"}}}}}}};
}
Json form(const Pack&) {
  return {{"anyOf",
           {{{"enum", {"auto", "off"}}}, {{"type", "integer"}, {"minimum", 1}, {"maximum", 64}}}}};
}
Json form(const Patch&) { return {{"$ref", "#/$defs/patch"}}; }
Json form(const AxisValue&) {
  return {{"anyOf",
           {{{"$ref", "#/$defs/labelled"}},
            {{"type", {"string", "number", "boolean", "array", "null"}}},
            {{"type", "object"},
             {"properties", {{"label", {{"type", "string"}}}, {"value", Json::object()}}},
             {"required", {"label", "value"}},
             {"additionalProperties", false}}}}};
}
Json form(const Selection&) {
  const Json label = {{"type", {"string", "number", "boolean"}}};
  return {{"type", "object"},
          {"additionalProperties",
           {{"anyOf", {label, {{"type", "array"}, {"items", label}, {"minItems", 1}}}}}}};
}

Json or_null(Json schema) {
  const Json null = {{"type", "null"}};
  if (!schema.contains("anyOf")) return {{"anyOf", {std::move(schema), null}}};
  Json& forms = schema["anyOf"];
  if (forms.back() != null) forms.push_back(null);
  return schema;
}

class SchemaWriter {
 public:
  /// `path` is "" or "adapter."; a `partial` object's fields may be null: back to the default.
  SchemaWriter(std::string path, bool partial, std::set<std::string>& described)
      : path_(std::move(path)), partial_(partial), described_(described) {}

  template <class T> void operator()(const char* key, T& value) {
    const std::string path = path_ + key;
    Json schema = of(value, path);
    if (partial_) schema = or_null(std::move(schema));
    const auto text = descriptions().find(path);
    if (text == descriptions().end()) throw std::logic_error("no description of " + path);
    described_.insert(path);
    schema["description"] = text->second;
    if constexpr (!requires(SchemaWriter w) { fields(w, value); })
      if (const Json start = write(value); !start.is_null() && !start.empty() && start != "")
        schema["default"] = start;
    properties_[key] = std::move(schema);
  }

  Json object() const {
    return {{"type", "object"}, {"properties", properties_}, {"additionalProperties", false}};
  }

 private:
  template <class T> Json of(T& value, const std::string& path) {
    if constexpr (requires(SchemaWriter w) { fields(w, value); }) {
      SchemaWriter inner(path + ".", partial_, described_);
      fields(inner, value);
      return inner.object();
    } else if constexpr (requires { enum_names(value); }) {
      Json names = Json::array();
      for (const auto& [enumerator, name] : enum_names(value)) names.push_back(name);
      return {{"enum", names}};
    } else if constexpr (requires { form(value); }) {
      return form(value);
    } else if constexpr (detail::IsOptional<T>::value) {
      typename T::value_type inner{};
      return or_null(of(inner, path));
    } else if constexpr (detail::IsVector<T>::value) {
      typename T::value_type item{};
      Json list = {{"type", "array"}, {"items", of(item, path)}};
      if (path != "train.tasks" && path != "evaluate.suites") return list;
      return {{"anyOf", {std::move(list), {{"type", "string"}}}}};  // "a;b;c"
    } else if constexpr (std::is_same_v<T, bool>) {
      return {{"type", "boolean"}};
    } else if constexpr (std::is_unsigned_v<T>) {
      return {{"type", "integer"}, {"minimum", 0}};
    } else if constexpr (std::is_integral_v<T>) {
      return {{"type", "integer"}};
    } else if constexpr (std::is_floating_point_v<T>) {
      return {{"type", "number"}};
    } else {
      return {{"type", "string"}};
    }
  }

  std::string path_;
  bool partial_;
  std::set<std::string>& described_;
  Json properties_ = Json::object();
};

}  // namespace

Json sweep_schema() {
  std::set<std::string> described;
  SweepFile file;
  SchemaWriter whole("", false, described);
  fields(whole, file);
  Json schema = whole.object();
  schema["required"] = {"name"};
  schema["properties"]["tables"]["items"] = {{"enum", table_names()}};
  for (const char* key : {"name", "values"})
    schema["properties"]["axes"]["items"]["required"].push_back(key);
  schema["properties"]["include"]["items"] = {{"$ref", "#/$defs/labelled"}};

  TrialSpec spec;
  SchemaWriter part("", true, described);
  fields(part, spec);
  Json patch = part.object();
  for (const char* group : {"adapter", "train", "evaluate"}) {
    Json& own = patch["properties"][group];
    const Json text = own["description"];
    schema["$defs"][group] = std::move(own);
    own = {{"$ref", fmt::format("#/$defs/{}", group)}, {"description", text}};
  }
  schema["$defs"]["labelled"] = patch;
  schema["$defs"]["labelled"]["required"] = {"label"};
  schema["$defs"]["labelled"]["properties"]["label"] = {
      {"type", "string"}, {"description", "Names the row in the tables."}};
  schema["$defs"]["patch"] = std::move(patch);
  schema["$schema"] = "https://json-schema.org/draft/2020-12/schema";
  schema["title"] = "mixlora-bench sweep";
  for (const auto& [path, text] : descriptions())
    if (described.count(path) == 0) throw std::logic_error("no field " + path);
  return schema;
}

}  // namespace mixlora
