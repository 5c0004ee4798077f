// profile and bench: parts sum to the step, trials are found, packs are timed, wrong input is told.
#include <algorithm>
#include <map>

#include "tests/experiments/program.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

double value_of(const Json& table, std::size_t row, std::size_t column) {
  return table["rows"].at(row)["cells"].at(column)["value"].get<double>();
}
std::string name_of(const Json& table, std::size_t row) {
  return table["rows"].at(row)["cells"].at(0)["text"].get<std::string>();
}
std::size_t column_of(const Json& table, const std::string& name) {
  const auto columns = table["columns"].get<std::vector<std::string>>();
  const auto at = std::find(columns.begin(), columns.end(), name);
  REQUIRE(at != columns.end());
  return static_cast<std::size_t>(at - columns.begin());
}

}  // namespace

TEST_CASE("the parts of a profile sum to the step", "[experiments][profile]") {
  const Program p;
  p.write_sweep("s.json", {"base", "lora", "mixlora"}, R"({"run": {"recompute": "layer"}})");
  const Output o = p.run({"profile", "s.json", "--trial", "mixlora", "--warmup", "1", "--steps",
                          "2", "--format", "json", "--out", "tables"});
  INFO(o.err);
  REQUIRE(o.code == 0);
  const Json tables = parse_json(o.out, "profile");
  REQUIRE(tables.size() == 4);
  const Json &summary = tables[0], &families = tables[1], &layers = tables[2], &ops = tables[3];
  std::map<std::string, double> numbers;
  for (std::size_t i = 0; i < summary["rows"].size(); ++i)
    numbers[name_of(summary, i)] = value_of(summary, i, 1);
  const double device = numbers.at("device, first mark to last");
  constexpr double kRounding = 1e-9;
  CHECK(numbers.at("in calls") + numbers.at("between calls") == Approx(device).epsilon(kRounding));
  CHECK(device <= numbers.at("wall time with marks"));
  CHECK(numbers.at("tokens") > 0);

  const std::size_t total = column_of(families, "total");
  double family_sum = 0;
  const std::size_t last = families["rows"].size() - 1;
  for (std::size_t i = 0; i < last; ++i) family_sum += value_of(families, i, total);
  CHECK(name_of(families, last - 1) == "between calls");
  CHECK(family_sum == Approx(value_of(families, last, total)).epsilon(kRounding));
  for (const char* phase : {"forward", "loss", "backward", "recompute", "optimizer"})
    CHECK(value_of(families, last, column_of(families, phase)) > 0);

  double layer_sum = 0, op_sum = 0;
  REQUIRE(layers["rows"].size() == 3);  // two layers and what lies outside
  for (std::size_t i = 0; i < 3; ++i) layer_sum += value_of(layers, i, column_of(layers, "total"));
  for (std::size_t i = 0; i < ops["rows"].size(); ++i)
    op_sum += value_of(ops, i, column_of(ops, "ms"));
  CHECK(layer_sum == Approx(numbers.at("in calls")).epsilon(kRounding));
  CHECK(op_sum == Approx(numbers.at("in calls")).epsilon(kRounding));
  CHECK(value_of(layers, 1, column_of(layers, "recompute")) > 0);
  CHECK(std::filesystem::exists(p.folder() / "tables/families.csv"));
}

TEST_CASE("profile without a sweep takes bench's options", "[experiments][profile]") {
  const Program p;
  const Output o =
      p.run({"profile", "--model", "tiny", "--shape", "2x16", "--method", "lora+dora", "--rank",
             "4", "--device", "cpu", "--warmup", "0", "--steps", "1", "--format", "csv"});
  INFO(o.err);
  CHECK(o.code == 0);
  CHECK(o.out.find("tokens,64,1") != std::string::npos);  // both adapters' 2 x 16
}

TEST_CASE("bench takes an adapter's fields", "[experiments][bench]") {
  const Program p;
  const auto bench = [&](const std::string& adapter) {
    return p.run({"bench", "--model", "tiny", "--shape", "2x16", "--methods", "mixlora", "--rank",
                  "4", "--device", "cpu", "--steps", "2", "--rows", "0", "--adapter", adapter,
                  "--format", "json"});
  };
  const auto measured = [](const Output& o) {
    INFO(o.err);
    REQUIRE(o.code == 0);
    const Json table = parse_json(o.out, "bench");
    return value_of(table, 0, column_of(table, "measured MiB"));
  };
  const Output few = bench("{\"num_experts\": 2, \"top_k\": 1}"),
               many = bench("{\"num_experts\": 6, \"top_k\": 1}");
  CHECK(measured(few) < measured(many));
  CHECK(few.out.find("num_experts") != std::string::npos);  // the title says it
}

TEST_CASE("profile refuses what it cannot profile", "[experiments][profile]") {
  const Program p;
  p.write_sweep("s.json", {"base", "lora", "dora"});
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases{
      {{"profile", "s.json"}, "name the trial to profile with --trial; expected one of"},
      {{"profile", "s.json", "--trial", "rola"}, "has this label or a key that begins so"},
      {{"profile", "s.json", "--trial", "base"}, "the base model is not trained"},
      {{"profile", "s.json", "--trial", "lora", "--rank", "4"}, "--rank: the sweep file says this"},
      {{"profile", "--trial", "lora"}, "expected a sweep file"},
      {{"profile", "--model", "tiny", "--shape", "2by16"}, "expected SEQUENCESxTOKENS"},
      {{"profile", "--model", "shape:llama-2-7b"}, "name one with --tokenizer"},
      {{"profile", "--model", "tiny", "--shape", "2x16", "--method", "lra"}, "\"lora\""},
      {{"profile", "s.json", "--trial", "lora", "--adapter", "{}"},
       "--adapter: the sweep file says this"},
      {{"profile", "--model", "tiny", "--shape", "2x16", "--adapter", "{\"top_k\": 1"},
       "--adapter: line 1"},
      {{"profile", "--model", "tiny", "--shape", "2x16", "--adapter", "{\"method\": \"dora\"}"},
       "fields but its method"},
      {{"profile", "--model", "tiny", "--shape", "2x16", "--adapter", "{\"topk\": 1}"},
       "did you mean \"top_k\""},
      {{"profile", "s.json", "--trial", "lora", "--window"}, "--window: expected a CUDA device"},
      {{"profile", "--model", "tiny", "--shape", "2x16", "--format", "pdf"}, "no format \"pdf\""}};
  for (const auto& [arguments, expected] : cases) {
    const Output o = p.run(arguments);
    INFO(expected << " in:\n" << o.err);
    CHECK(o.code == 2);
    CHECK(o.err.find(expected) != std::string::npos);
    CHECK(o.out.empty());
  }
}

TEST_CASE("bench times adapters in one step, and says what does not fit", "[experiments][bench]") {
  const Program p;
  const auto bench = [&](const std::string& limit) {
    return p.run({"bench",
                  "--model",
                  "tiny",
                  "--shape",
                  "3x16",
                  "--methods",
                  "lora,mixlora+mixlora",
                  "--rank",
                  "4",
                  "--device",
                  "cpu",
                  "--steps",
                  "2",
                  "--rows",
                  "2",
                  "--recompute",
                  "auto",
                  "--memory-limit",
                  limit,
                  "--format",
                  "json",
                  "--out",
                  "tables"});
  };
  const Output o = bench("1");
  INFO(o.err);
  REQUIRE(o.code == 0);
  const Json table = parse_json(o.out, "bench");
  REQUIRE(table["rows"].size() == 2);
  const std::size_t all = column_of(table, "measured MiB"), each = column_of(table, "MiB each"),
                    planned = column_of(table, "planned MiB");
  CHECK(value_of(table, 0, all) == value_of(table, 0, each));
  CHECK(value_of(table, 1, all) == Approx(2 * value_of(table, 1, each)));
  CHECK(value_of(table, 1, all) == Approx(value_of(table, 1, planned)));
  CHECK(value_of(table, 1, column_of(table, "tokens/s")) > 0);
  CHECK(std::filesystem::exists(p.folder() / "tables/bench.json"));
  const Output small = bench("0.0005");
  CHECK(small.code == 0);
  CHECK(small.err.find("lora: training needs") != std::string::npos);
  CHECK(parse_json(small.out, "bench")["rows"][1]["cells"][1]["text"] == "does not fit");
}
