// Sweeps: what an axis, when, path, include and exclude make of a base.
#include "experiments/sweep.h"

#include "engine/error.h"
#include "tests/support/golden.h"

using namespace mixlora;

namespace {

Sweep sweep_of(const std::string& axes_and_more) {
  return parse_sweep(parse_json(fmt::format(R"({{"name": "s", "model": "shape:smollm2-135m",
        "base": {{"train": {{"tasks": "starter-blank;starter-truth"}},
                  "evaluate": {{"suites": ["starter-blank"]}}}}{}}})",
                                            axes_and_more),
                                "s.json"),
                     "s.json");
}

/// The fields in which a trial differs from the defaults.
std::string changes(const TrialSpec& spec) {
  const Json plain = write(TrialSpec{}).flatten();
  std::string text;
  const Json flat = write(spec).flatten();
  for (const auto& [path, value] : flat.items())
    if (!plain.contains(path) || plain[path] != value)
      text += fmt::format(" {}={}", path, value.dump());
  return text;
}

constexpr const char* kGrid = R"(, "axes": [
  {"name": "method", "values": [
    {"label": "base", "adapter": {"method": "base"}},
    {"label": "LoRA"},
    {"label": "MixLoRA", "adapter": {"method": "mixlora"}}]},
  {"name": "routing", "when": {"method": "MixLoRA"}, "values": [
    {"label": "top-1", "adapter": {"top_k": 1}},
    {"label": "switch", "adapter": {"routing_strategy": "mixlora-switch"}}]},
  {"name": "seed", "path": "/train/seed", "values": [1, 2]}],
  "exclude": [{"routing": "switch", "seed": 2}],
  "include": [{"label": "LoRA r4", "adapter": {"r": 4}}])";

}  // namespace

TEST_CASE("axes, when, exclude and include make the trials, and say which are left out",
          "[experiments][approval]") {
  const Sweep s = sweep_of(kGrid);
  std::string text;
  for (const Trial& t : s.trials) text += fmt::format("{}:{}\n", t.label, changes(t.spec));
  for (const LeftOut& l : s.left_out) text += fmt::format("- {}: {}\n", l.label, l.reason);
  require_golden("sweep-expansion.txt", text);
}

TEST_CASE("null in a patch goes back to the default", "[experiments][sweep]") {
  const Sweep s = sweep_of(R"(, "axes": [{"name": "a", "values": [
    {"label": "x", "adapter": {"r": 4}}, {"label": "y", "adapter": null},
    {"label": "z", "train": {"lr": null}, "evaluate": {"limit": null}}]}])");
  REQUIRE(s.trials.size() == 2);  // y and z are the same trial
  CHECK(s.trials[0].spec.adapter.r == 4);
  CHECK(s.trials[1].spec.adapter.r == AdapterSpec{}.r);
  REQUIRE(s.left_out.size() == 1);
  CHECK(s.left_out[0].reason == "equal to \"y\"");
}

TEST_CASE("a labelled value of a path keeps its label", "[experiments][sweep]") {
  const Sweep s = sweep_of(R"(, "axes": [{"name": "tasks", "path": "/train/tasks", "values": [
    {"label": "one", "value": ["starter-blank"]}, "starter-blank;starter-truth"]}])");
  REQUIRE(s.trials.size() == 2);
  CHECK(s.trials[0].label == "one");
  CHECK(s.trials[1].spec.train.tasks == std::vector<std::string>{"starter-blank", "starter-truth"});
}

TEST_CASE("a key holds what can change a result and nothing else", "[experiments][trial]") {
  TrialSpec spec;
  spec.train.tasks = {"starter-blank"};
  const auto key = [](const TrialSpec& s, DType type = DType::f32) {
    return trial_key(s, "model", "data", type);
  };
  const std::string before = key(spec);
  TrialSpec same = spec;
  same.model = "elsewhere";
  same.train.micro_batch_size = 4;
  same.adapter.top_p = 0.5;   // LoRA has no router
  same.train.momentum = 0.5;  // AdamW has none
  CHECK(key(same) == before);
  TrialSpec other = spec;
  other.train.seed = 43;
  CHECK(key(other) != before);
  other = spec;
  other.adapter.act_fn = Activation::gelu;
  CHECK(key(other) != before);
  CHECK(key(spec, DType::bf16) != before);
  CHECK(trial_key(spec, "other", "data", DType::f32) != before);
  CHECK(trial_key(spec, "model", "other", DType::f32) != before);
  TrialSpec base = spec, base_r = spec;
  base.adapter.method = base_r.adapter.method = Method::base;
  base_r.adapter.r = 4;
  base_r.train.lr = 1;
  CHECK(key(base) == key(base_r));
}
