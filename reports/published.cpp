#include "reports/published.h"

#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/json_file.h"
#include "reports/embedded.h"

namespace mixlora {
namespace {

const Json& file() {
  static const Json kJson = parse_json(embedded("published.json"), "published.json");
  return kJson;
}
std::string lower(std::string s) {
  std::transform(s.begin(), s.end(), s.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return s;
}
std::vector<Published> rows_of(const std::string& table, const std::string& model) {
  std::vector<Published> out;
  for (const Json& row : file()[table]) {
    if (row["model"] != model) continue;
    Published& p = out.emplace_back();
    p.source = file()["sources"][row["source"].get<std::string>()]["title"];
    p.model = file()["models"][model]["title"];
    p.method = row.value("method", "");
    p.label = row.value("label", "");
    if (row.contains("params_percent")) p.params_percent = row["params_percent"];
    if (row.contains("value")) p.value = row["value"];
    const Json scores = row.value("scores", row);  // an efficiency row is flat
    for (const auto& [key, v] : scores.items())
      if (v.is_number()) p.scores[key] = v;
  }
  return out;
}

}  // namespace

std::vector<Published> published(const std::string& table, const std::string& model,
                                 bool otherwise) {
  for (const auto& [key, entry] : file()["models"].items())
    for (const Json& name : entry["names"])
      if (name == lower(model))
        if (auto rows = rows_of(table, key); !rows.empty()) return rows;
  return otherwise ? rows_of(table, "llama-2-7b") : std::vector<Published>{};
}

std::string method_title(const std::string& method) {
  if (method == "lora") return "LoRA";
  if (method == "dora") return "DoRA";
  if (method == "mixlora") return "MixLoRA";
  if (method == "mixdora") return "MixDoRA";
  return method;
}

TableRow published_row(const Published& p, const std::string& label,
                       const std::vector<std::string>& suites, bool average) {
  TableRow row({label}, RowKind::published);
  double sum = 0;
  bool complete = true;
  for (const auto& s : suites) {
    const auto at = p.scores.find(s);
    complete = complete && at != p.scores.end();
    row.cells.push_back(
        number_cell(at == p.scores.end() ? std::nullopt : std::optional(at->second), 1));
    sum += at == p.scores.end() ? 0 : at->second;
  }
  if (average)
    row.cells.push_back(number_cell(
        complete ? std::optional(sum / static_cast<double>(suites.size())) : std::nullopt, 1));
  return row;
}

}  // namespace mixlora
