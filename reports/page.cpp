#include "reports/page.h"

#include <algorithm>
#include <set>

#include <fmt/format.h>

#include "reports/embedded.h"
#include "reports/template.h"

namespace mixlora {
namespace {

/// to_json(table), with what the template asks of each column, row and cell.
Json table_values(const Table& t) {
  Json out = to_json(t);
  Json columns = Json::array();
  for (std::size_t i = 0; i < t.columns.size(); ++i) {
    const bool numbers = i > 0 && std::any_of(t.rows.begin(), t.rows.end(), [i](const TableRow& r) {
                           return r.cells[i].value.has_value();
                         });
    columns.push_back({{"text", t.columns[i]}, {"index", i}, {"numeric", numbers}});
  }
  for (Json& row : out["rows"]) {
    for (std::size_t i = 0; i < row["cells"].size(); ++i) {
      Json& cell = row["cells"][i];
      cell["head"] = i == 0;
      cell["numeric"] = columns[i]["numeric"];
      cell["best"] = cell.value("mark", "") == "best";
      cell["second"] = cell.value("mark", "") == "second";
      cell["sort"] = cell.contains("value") ? cell["value"].dump() : std::string();
      cell["tip"] = cell.contains("low") && cell.contains("value")
                        ? fmt::format("interval {:.1f} to {:.1f}", cell["low"].get<double>(),
                                      cell["high"].get<double>())
                        : std::string();
    }
  }
  out["columns"] = std::move(columns);
  return out;
}

}  // namespace

std::string render_page(const Study& study, const ReportOptions& options) {
  Json tables = Json::array(), charts = Json::array(), maps = Json::array(), links = Json::array();
  for (const TableKind& kind : table_kinds())
    for (const Table& t : kind.build(study, options)) tables.push_back(table_values(t));
  int number = 0;
  for (const Chart& c : build_charts(study, options)) {
    Json& chart = (c.form == ChartForm::heat ? maps : charts).emplace_back(geometry(c));
    chart["id"] = fmt::format("figure-{}", ++number);
    for (const char* part : {"lines", "marks", "legend", "groups", "cells", "y_ticks"})
      if (!chart.contains(part)) chart[part] = Json::array();
  }
  for (const Json& t : tables) links.push_back({{"to", t["name"]}, {"text", t["title"]}});
  for (const Json& c : charts)
    links.push_back({{"to", c["id"]}, {"text", c["title"].get<std::string>() + " (figure)"}});
  if (!maps.empty())
    links.push_back({{"to", maps[0]["id"]},
                     {"text", fmt::format("Expert load by layer ({} figure{})", maps.size(),
                                          maps.size() == 1 ? "" : "s")}});
  std::set<std::string> devices;
  std::int64_t done = 0;
  for (const StudyTrial& t : study.trials) {
    if (!t.device.empty()) devices.insert(t.device);
    done += t.done() ? 1 : 0;
  }
  std::string on;
  for (const auto& d : devices) on += (on.empty() ? "" : "; ") + d;
  const Json values = {{"title", study.name},
                       {"model", model_name(study)},
                       {"created", study.created},
                       {"devices", on},
                       {"done", done},
                       {"trials", study.trials.size()},
                       {"tables", tables},
                       {"charts", charts},
                       {"maps", maps},
                       {"links", links},
                       {"style", std::string(embedded("html/style.css"))},
                       {"script", std::string(embedded("html/script.js"))}};
  return fill(embedded("html/page.html"), values,
              [](const std::string& name) { return embedded("html/" + name); });
}

}  // namespace mixlora
