// Import: files in the form of m-LoRA's and MoE-PEFT's become sweeps that read.
#include "experiments/import.h"

#include "engine/error.h"
#include "experiments/sweep.h"
#include "tests/support/golden.h"

using namespace mixlora;

namespace {

// The shape of MoE-PEFT's template files, with numbers of this test's own.
constexpr const char* kMoePeft = R"({
  "cutoff_len": 384, "save_step": 500, "train_lora_candidate_num": 4,
  "train_lora_simultaneously_num": 2, "train_strategy": "optim",
  "lora": [
    {"name": "mix", "task_name": "starter-blank;starter-truth", "optim": "adamw",
     "scheduler_type": "cosine", "warmup_steps": 3, "lr": 1e-3, "batch_size": 12,
     "micro_batch_size": 6, "evaluate_batch_size": 8, "num_epochs": 1, "r": 8, "lora_alpha": 24,
     "lora_dropout": 0.1,
     "target_modules": {"q_proj": true, "k_proj": false, "v_proj": true, "o_proj": false,
                        "gate_proj": true, "down_proj": true, "up_proj": true},
     "routing_strategy": "mixlora", "num_experts": 6, "top_k": 3, "group_by_length": false},
    {"name": "dora", "task_name": "starter-blank", "lr": 1e-3, "r": 8, "lora_alpha": 16,
     "target_modules": {"q_proj": true}, "use_dora": true, "top_k": 2}]})";

// The shape of m-LoRA's older files.
constexpr const char* kMlora = R"({
  "cutoff_len": 256, "early_stop_test_step": 100,
  "lora": [
    {"name": "switch", "data": "data/own.json", "prompt": "template/own.json", "optim": "sgd",
     "momentum": 0.5, "lr": 0.01, "warmup_steps": 0.1, "batch_size": 8, "test_batch_size": 32,
     "num_epochs": 2, "r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
     "target_modules": {"w1_proj": true, "w2_proj": true, "w3_proj": true},
     "routing_strategy": "switch", "num_experts": 4, "expert_capacity": 16, "sparse_step": 1,
     "expert_lora": {"r": 2, "use_rslora": true}, "expand_side": "right"}]})";

constexpr const char* kAdapter = R"({
  "peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "bias": "none",
  "base_model_name_or_path": "models/base", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
  "target_modules": ["q_proj", "gate_proj"], "use_dora": true, "use_rslora": false,
  "routing_strategy": "mixlora-dynamic", "num_experts": 8, "top_p": 0.75, "act_fn": "silu"})";

std::string text_of(const char* config, const std::string& model) {
  const Imported made = import_config(parse_json(config, "old.json"), "old.json", "old", model);
  std::string text = made.sweep.dump(2) + "\n";
  for (const auto& note : made.notes) text += "note: " + note + "\n";
  return text;
}

std::string error_of(const std::string& config) {
  try {
    import_config(parse_json(config, "old.json"), "old.json", "old", "m");
  } catch (const InputError& e) {
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("old configuration files become sweeps, with a note for what has no place",
          "[experiments][approval]") {
  require_golden("import.txt",
                 text_of(kMoePeft, "m") + text_of(kMlora, "m") + text_of(kAdapter, ""));
}

TEST_CASE("an imported sweep reads as one", "[experiments][import]") {
  const Sweep s = parse_sweep(
      import_config(parse_json(kMoePeft, "c"), "c", "old", "shape:smollm2-135m").sweep, "s");
  REQUIRE(s.trials.size() == 2);
  CHECK(s.trials[0].spec.adapter.method == Method::mixlora);
  CHECK(s.trials[0].spec.adapter.num_experts == 6);
  CHECK(s.trials[0].spec.train.cutoff_len == 384);
  CHECK(s.trials[1].spec.adapter.method == Method::dora);
}

TEST_CASE("what an old file asks for and is not here is an error", "[experiments][import]") {
  CHECK(error_of(R"({"lora": []})") ==
        "old.json: lora: expected a list of one adapter or more, found []");
  CHECK(error_of(R"({"lora": [{"rr": 1}]})").starts_with("old.json: lora[0]: unknown key \"rr\""));
  CHECK(error_of(R"({"lora": [{"routing_strategy": "mola"}]})") ==
        "old.json: lora[0].routing_strategy: \"mola\" is another method than MixLoRA; not "
        "supported");
  CHECK(error_of(R"({"lora": [{"sparse_step": 2}]})")
            .starts_with("old.json: lora[0].sparse_step: 2"));
  CHECK(error_of(R"({"lora": [{"r": "x"}]})") ==
        "old.json: lora[0].adapter.r: expected a whole number, found \"x\"");
  CHECK(error_of(R"({"peft_type": "IA3"})") ==
        "old.json: adapter.peft_type: \"IA3\"; expected \"LORA\" or \"MIXLORA\"");
}
