// Tables of routers: accuracy by routing, top-k and experts; who got the work.
#include <algorithm>
#include <cmath>
#include <set>

#include "reports/published.h"
#include "reports/report.h"

namespace mixlora {
namespace {

/// "MixLoRA top-2", "MixDoRA switch", "MixLoRA top-p 0.8".
std::string routing_of(const StudyTrial& t) {
  const std::string kind = t.text("/adapter/routing_strategy");
  const std::string head = method_title(t.method()) + " ";
  if (kind == "mixlora-switch") return head + "switch";
  if (kind == "mixlora-dynamic") return head + "top-p " + t.text("/adapter/top_p");
  return head + "top-" + t.text("/adapter/top_k");
}
bool has_router(const StudyTrial& t) { return t.method() == "mixlora" || t.method() == "mixdora"; }

/// Mean share by expert over seeds and, unless a layer is given, over layers.
std::vector<double> shares_of(const Configuration& c, std::optional<std::int64_t> layer) {
  std::vector<double> sum;
  std::vector<std::int64_t> count;
  for (const StudyTrial* t : c.trials)
    for (const StudyLoad& l : t->loads) {
      if (layer && l.layer != *layer) continue;
      const auto e = static_cast<std::size_t>(l.expert);
      if (sum.size() <= e) {
        sum.resize(e + 1);
        count.resize(e + 1);
      }
      sum[e] += l.share;
      ++count[e];
    }
  for (std::size_t e = 0; e < sum.size(); ++e)
    sum[e] /= static_cast<double>(std::max<std::int64_t>(1, count[e]));
  return sum;
}
/// Entropy of the shares over that of equal ones: 1 is a balanced load, 0 one expert alone.
double balance(const std::vector<double>& shares) {
  double h = 0;
  for (const double p : shares)
    if (p > 0) h -= p * std::log(p);
  return shares.size() < 2 ? 1 : h / std::log(static_cast<double>(shares.size()));
}
void expert_columns(Table& t, std::size_t experts) {
  for (std::size_t e = 0; e < experts; ++e) t.columns.push_back(fmt::format("e{}", e));
}

}  // namespace

Tables grid_tables(const Study& study, const ReportOptions& options) {
  std::vector<Configuration> all;
  std::vector<std::string> rows;
  std::set<std::int64_t> experts;
  for (const Configuration& c : configurations(study)) {
    if (!has_router(c.first())) continue;
    all.push_back(c);
    if (const auto r = routing_of(c.first()); std::find(rows.begin(), rows.end(), r) == rows.end())
      rows.push_back(r);
    experts.insert(std::stoll(c.first().text("/adapter/num_experts")));
  }
  if (experts.size() < 2 || rows.size() < 2) return {};
  Tables out;
  for (const Variant& v : variants(study)) {
    auto views = suites_of(study);
    if (views.size() > 1) views.insert(views.begin(), "");  // the mean over suites first
    for (const auto& view : views) {
      Table t;
      t.name = variant_name(view.empty() || views.size() == 1 ? "grid" : "grid-" + view, study, v);
      t.title = fmt::format("Routing and experts: {} (%)",
                            view.empty() ? "mean over suites" : column_of(view));
      t.columns = {"routing"};
      for (const auto e : experts) t.columns.push_back(fmt::format("{} experts", e));
      bool any = false, several = false, incomplete = false;
      for (const auto& label : rows) {
        TableRow row({label});
        for (const auto e : experts) {
          Cell cell("");
          std::int64_t matching = 0;
          for (const Configuration& c : all) {
            if (routing_of(c.first()) != label ||
                c.first().text("/adapter/num_experts") != std::to_string(e))
              continue;
            std::vector<Summary> scores;
            for (const auto& suite : suites_of(study))
              if (view.empty() || suite == view)
                if (auto s = summarise(c, suite, v, options.certainty.confidence))
                  scores.push_back(std::move(*s));
            const std::size_t asked = view.empty() ? views.size() - 1 : 1;
            Cell found = average_cell(scores, asked, options.certainty.confidence);
            incomplete = incomplete || found.text.ends_with("†");
            any = any || found.value.has_value();
            if (++matching == 1 || found.value > cell.value) cell = std::move(found);
          }
          several = several || matching > 1;
          row.cells.push_back(std::move(cell));
        }
        t.rows.push_back(std::move(row));
      }
      if (!any) continue;
      t.caption = protocol_text(all, v) + " ± is one standard error." +
                  (several ? " Where several trials share a cell, the best is shown." : "") +
                  (incomplete ? kIncomplete : "");
      out.push_back(std::move(t));
    }
  }
  return out;
}

Tables expert_load_tables(const Study& study, const ReportOptions& /*options*/) {
  Table t{"expert-load",
          "Expert load (%)",
          "Share of router choices in training, mean over layers (and seeds); lowest and highest "
          "share of any expert in any layer; balance: entropy of the shares over that of equal "
          "ones, mean over layers." +
              setting_text(study),
          {"trial"},
          {}};
  std::vector<std::pair<TableRow, std::vector<double>>> rows;
  std::size_t most = 0;
  for (const Configuration& c : configurations(study)) {
    const auto shares = shares_of(c, std::nullopt);
    if (shares.empty()) continue;
    double low = 1, high = 0, balanced = 0;
    std::set<std::int64_t> layers;
    for (const StudyTrial* trial : c.trials)
      for (const StudyLoad& l : trial->loads) {
        low = std::min(low, l.share);
        high = std::max(high, l.share);
        layers.insert(l.layer);
      }
    for (const auto layer : layers)
      balanced += balance(shares_of(c, layer)) / static_cast<double>(layers.size());
    TableRow row({c.label});
    for (const double s : shares) row.cells.push_back(number_cell(100 * s, 1));
    most = std::max(most, shares.size());
    Cell range(fmt::format("{:.1f}..{:.1f}", 100 * low, 100 * high));
    row.cells.push_back(std::move(range));
    row.cells.push_back(number_cell(balanced, 3));
    t.rows.push_back(std::move(row));
  }
  expert_columns(t, most);
  t.columns.insert(t.columns.end(), {"low..high", "balance"});
  for (TableRow& row : t.rows)
    row.cells.insert(row.cells.end() - 2, t.columns.size() - row.cells.size(), Cell(""));
  return t.rows.empty() ? Tables{} : Tables{t};
}

Tables layer_load_tables(const Study& study, const ReportOptions& /*options*/) {
  Table t{"expert-load-layers",
          "Expert load by layer (%)",
          "Share of router choices in training, mean over seeds; balance: entropy of the shares "
          "over that of equal ones." +
              setting_text(study),
          {"trial", "layer"},
          {}};
  std::size_t most = 0;
  for (const Configuration& c : configurations(study)) {
    std::set<std::int64_t> layers;
    for (const StudyTrial* trial : c.trials)
      for (const StudyLoad& l : trial->loads) layers.insert(l.layer);
    for (const auto layer : layers) {
      const auto shares = shares_of(c, layer);
      TableRow row({c.label, number_cell(static_cast<double>(layer), 0)});
      for (const double s : shares) row.cells.push_back(number_cell(100 * s, 1));
      row.cells.push_back(number_cell(balance(shares), 3));
      most = std::max(most, shares.size());
      t.rows.push_back(std::move(row));
    }
  }
  expert_columns(t, most);
  t.columns.emplace_back("balance");
  for (TableRow& row : t.rows)
    row.cells.insert(row.cells.end() - 1, t.columns.size() - row.cells.size(), Cell(""));
  return t.rows.empty() ? Tables{} : Tables{t};
}

}  // namespace mixlora
