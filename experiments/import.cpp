#include "experiments/import.h"

#include <algorithm>
#include <map>

#include "engine/error.h"
#include "engine/nearest.h"
#include "suites/task.h"

namespace mixlora {
namespace {

// Keys of both programs' files, as written by their template generators and read by their loaders:
// where each goes, or why it goes nowhere.                                   [methods.md section 5]
enum class Goes : std::uint8_t { adapter, train, nowhere, special };
struct Key {
  const char* name;
  Goes goes;
  const char* note = nullptr;  // said when the key stands in a file
};

constexpr const char* kPacked = "nothing is padded here; left out";
constexpr const char* kEvaluation = "scoring packs by tokens and does not depend on it; left out";

const Key kEntry[] = {
    {"name", Goes::special},
    {"task_name", Goes::special},
    {"task_type", Goes::special},
    {"data", Goes::special},
    {"dataset", Goes::special},
    {"prompt", Goes::nowhere, "a suite has its own prompt; left out"},
    {"optim", Goes::train},
    {"lr", Goes::train},
    {"loraplus_lr_ratio", Goes::train},
    {"momentum", Goes::train},
    {"weight_decay", Goes::train},
    {"scheduler_type", Goes::train},
    {"warmup_steps", Goes::special},
    {"warmup_ratio", Goes::train},
    {"num_epochs", Goes::train},
    {"batch_size", Goes::train},
    {"micro_batch_size", Goes::train},
    {"group_by_length", Goes::train},
    {"cutoff_len", Goes::train},
    {"evaluate_batch_size", Goes::nowhere, kEvaluation},
    {"test_batch_size", Goes::nowhere, kEvaluation},
    {"evaluate_steps", Goes::nowhere, "suites are asked once, after training; left out"},
    {"expand_side", Goes::nowhere, kPacked},
    {"expand_right", Goes::nowhere, kPacked},
    {"r", Goes::adapter},
    {"lora_alpha", Goes::adapter},
    {"lora_dropout", Goes::adapter},
    {"target_modules", Goes::adapter},
    {"use_dora", Goes::special},
    {"use_rslora", Goes::adapter},
    {"lora_init", Goes::adapter},
    {"init_lora_weights", Goes::nowhere, "weights start as lora_init says; left out"},
    {"routing_strategy", Goes::special},
    {"num_experts", Goes::adapter},
    {"top_k", Goes::adapter},
    {"top_p", Goes::adapter},
    {"temperature", Goes::adapter},
    {"router_init_range", Goes::adapter},
    {"jitter_noise", Goes::adapter},
    {"router_loss", Goes::adapter},
    {"router_aux_loss_coef", Goes::adapter},
    {"router_z_loss_coef", Goes::adapter},
    {"expert_capacity", Goes::adapter},
    {"ffn_dropout", Goes::adapter},
    {"act_fn", Goes::adapter},
    {"expert_lora", Goes::special},
    {"sparse_step", Goes::special},
    {"base_model_name_or_path", Goes::special},
    {"peft_type", Goes::special},
    {"bias", Goes::special},
    {"fan_in_fan_out", Goes::nowhere, "a storage order of GPT-2; left out"},
    {"inference_mode", Goes::nowhere, "left out"},
};

const std::vector<std::string> kWhole{"cutoff_len",
                                      "save_step",
                                      "early_stop_test_step",
                                      "train_lora_candidate_num",
                                      "train_lora_simultaneously_num",
                                      "train_strategy",
                                      "lora"};

class EntryReader {
 public:
  EntryReader(std::string where, Imported& out) : where_(std::move(where)), out_(out) {}
  /// The entry as a value of the axis: {"label", "adapter", "train", "evaluate"}.
  Json read(const Json& entry, std::size_t place);

 private:
  void note(const std::string& key, const std::string& text) {
    const std::string line = fmt::format("{}.{}: {}", where_, key, text);
    if (std::find(out_.notes.begin(), out_.notes.end(), line) == out_.notes.end())
      out_.notes.push_back(line);
  }
  void special(const std::string& key, const Json& value);
  void tasks(const std::string& key, const Json& value);
  void method();

  std::string where_;
  Imported& out_;
  Json adapter_ = Json::object(), train_ = Json::object(), evaluate_ = Json::object();
  std::string label_;
  bool routed_ = false, dora_ = false;
};

std::vector<std::string> entry_keys() {
  std::vector<std::string> names;
  for (const Key& k : kEntry) names.emplace_back(k.name);
  return names;
}

Json EntryReader::read(const Json& entry, std::size_t place) {
  require(entry.is_object(), "{}: expected an object, found {}", where_, entry.dump());
  for (const auto& [name, value] : entry.items()) {
    const auto key = std::find_if(std::begin(kEntry), std::end(kEntry),
                                  [&name = name](const Key& k) { return name == k.name; });
    if (key == std::end(kEntry))
      fail("{}: unknown key \"{}\"; {}", where_, name, nearest(name, entry_keys()));
    if (key->note != nullptr) note(name, key->note);
    if (key->goes == Goes::adapter) adapter_[name] = value;
    if (key->goes == Goes::train) train_[name] = value;
    if (key->goes == Goes::special) special(name, value);
  }
  method();
  if (label_.empty()) label_ = fmt::format("adapter_{}", place);
  Json out = {{"label", label_}, {"adapter", adapter_}, {"train", train_}};
  if (!evaluate_.empty()) out["evaluate"] = evaluate_;
  check_patch(
      [&] {
        Json patch = out;
        patch.erase("label");
        return patch;
      }(),
      where_);
  return out;
}

void EntryReader::special(const std::string& key, const Json& value) {
  const bool text = value.is_string();
  if (key == "name") {
    require(text, "{}.name: expected a name, found {}", where_, value.dump());
    label_ = value.get<std::string>();
  } else if (key == "task_name" || key == "task_type" || key == "data" || key == "dataset") {
    tasks(key, value);
  } else if (key == "warmup_steps") {
    // m-LoRA writes a share of all steps below 1 here.
    const bool share = value.is_number_float() && value > 0 && value < 1;
    train_[share ? "warmup_ratio" : "warmup_steps"] = value;
    if (share) note(key, "a share of all steps: written as warmup_ratio");
  } else if (key == "use_dora") {
    require(value.is_boolean(), "{}.use_dora: expected true or false, found {}", where_,
            value.dump());
    dora_ = value.get<bool>();
  } else if (key == "routing_strategy") {
    require(text, "{}.routing_strategy: expected a name, found {}", where_, value.dump());
    static const std::map<std::string, const char*> kOld{{"mixtral", "mixlora"},
                                                         {"switch", "mixlora-switch"}};
    const auto name = value.get<std::string>();
    const auto old = kOld.find(name);
    if (old != kOld.end()) note(key, fmt::format("\"{}\" is now \"{}\"", name, old->second));
    require(name != "mola" && name != "loramoe",
            "{}.routing_strategy: \"{}\" is another method than MixLoRA; not supported", where_,
            name);
    adapter_["routing_strategy"] = old == kOld.end() ? name : old->second;
    routed_ = true;
  } else if (key == "expert_lora") {
    require(value.is_object(), "{}.expert_lora: expected an object, found {}", where_,
            value.dump());
    Json own = value;
    for (const char* left : {"use_rslora", "target_modules", "lora_init"})
      if (own.erase(left) > 0)
        note(fmt::format("expert_lora.{}", left),
             "the adapter's own holds for its experts; left out");
    adapter_["expert_lora"] = std::move(own);
  } else if (key == "sparse_step") {
    require(value == 1 || value.is_null(),
            "{}.sparse_step: {}: experts in some layers only; expected 1 (every layer has experts)",
            where_, value.dump());
  } else if (key == "bias") {
    require(value == "none", "{}.bias: {}; expected \"none\": biases are not trained", where_,
            value.dump());
  } else if (key == "peft_type") {
    require(value == "LORA" || value == "MIXLORA",
            "{}.peft_type: {}; expected \"LORA\" or \"MIXLORA\"", where_, value.dump());
    routed_ = routed_ || value == "MIXLORA";
  }
}

/// "casual" tasks name a file of texts; the suites are known by name, several as "a;b".
void EntryReader::tasks(const std::string& key, const Json& value) {
  if (value.is_null() || value == "" || value == "casual" || value == "CAUSAL_LM") return;
  require(value.is_string(), "{}.{}: expected a name, found {}", where_, key, value.dump());
  const Json list = resolved({{"train", {{"tasks", value}}}})["train"]["tasks"];
  for (const Json& name : list) try {
      find_task(name.get<std::string>());
    } catch (const InputError& e) {
      note(key, fmt::format("{}; set train.tasks and evaluate.suites by hand", e.what()));
      return;
    }
  train_["tasks"] = list;
  evaluate_["suites"] = list;
}

void EntryReader::method() {
  adapter_["method"] = routed_ ? (dora_ ? "mixdora" : "mixlora") : (dora_ ? "dora" : "lora");
  if (routed_) return;
  for (const char* key : {"num_experts", "top_k", "top_p", "temperature", "router_init_range",
                          "jitter_noise", "router_loss", "router_aux_loss_coef",
                          "router_z_loss_coef", "expert_capacity", "expert_lora"})
    if (adapter_.erase(key) > 0)
      note(key, "there is no routing_strategy, so no router: left out, as the original does");
}

}  // namespace

Imported import_config(const Json& config, const std::string& file, const std::string& name,
                       const std::string& model) {
  require(config.is_object(), "{}: expected an object, found {}", file, config.type_name());
  Imported out;
  const bool whole = config.contains("lora");
  Json entries = Json::array({config});
  if (whole) {
    for (const auto& [key, value] : config.items()) {
      if (std::find(kWhole.begin(), kWhole.end(), key) == kWhole.end())
        fail("{}: unknown key \"{}\"; {}", file, key, nearest(key, kWhole));
      if (key != "lora" && key != "cutoff_len")
        out.notes.push_back(fmt::format("{}: {}: has no meaning here; left out", file, key));
    }
    entries = config["lora"];
    require(entries.is_array() && !entries.empty(),
            "{}: lora: expected a list of one adapter or more, found {}", file, entries.dump());
  }
  Json values = Json::array();
  for (std::size_t i = 0; i < entries.size(); ++i) {
    EntryReader reader(whole ? fmt::format("{}: lora[{}]", file, i) : file + ": adapter", out);
    Json value = reader.read(entries[i], i);
    if (whole && config.contains("cutoff_len") && !value["train"].contains("cutoff_len"))
      value["train"]["cutoff_len"] = config["cutoff_len"];
    values.push_back(std::move(value));
  }
  const Json& source = entries[0].value("base_model_name_or_path", Json());
  out.sweep = {{"name", name},
               {"model", model.empty() && source.is_string() ? source : Json(model)},
               {"axes", {{{"name", "adapter"}, {"values", values}}}}};
  return out;
}

}  // namespace mixlora
