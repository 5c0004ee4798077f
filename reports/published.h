// Published: the numbers that papers print, from published.json, which the program carries.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "reports/table.h"

namespace mixlora {

struct Published {
  std::string source, model;  // titles: "MixLoRA, arXiv 2404.15159v3", "Llama-2-7B"
  std::string method, label;  // "mixlora"; the label of an efficiency row
  std::optional<double> params_percent, value;  // value: of a rank or a coefficient
  std::map<std::string, double> scores;         // percent by suite; or columns of an efficiency row
};

/// Rows of a table ("single-task", "multi-task", "rank", "router-coef", "efficiency") for a model
/// given by the last part of its path; when no row is for it, of Llama-2-7B if `otherwise`.
std::vector<Published> published(const std::string& table, const std::string& model,
                                 bool otherwise);
/// "lora" -> "LoRA".
std::string method_title(const std::string& method);
/// A row with the published scores for these suites and, when `average`, their mean where all are
/// there.
TableRow published_row(const Published& p, const std::string& label,
                       const std::vector<std::string>& suites, bool average);

}  // namespace mixlora
