// Report: the tables and charts of a study, by name.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "reports/chart.h"
#include "reports/study.h"
#include "reports/table.h"

namespace mixlora {

struct ReportOptions {
  Certainty certainty;
  std::string reference;  // whose label the others are tested against; empty: the first trained
};

/// One entry of the list of tables. A builder returns no table when the study has nothing for it
/// (no router, one seed), and several when it has several ways of scoring.
struct TableKind {
  const char* name;
  const char* what;
  bool brief;  // printed unasked; the rest on --only, --out and in the page
  std::vector<Table> (*build)(const Study& study, const ReportOptions& options);
};
const std::vector<TableKind>& table_kinds();
/// Throws InputError with the nearest name.
const TableKind& find_table_kind(const std::string& name);

/// Writes NAME.md, .csv, .tex and .json into a folder, which is made when it is not there.
void write_table(const Table& table, const std::filesystem::path& folder);

/// The pictures of a study: accuracy with intervals, learning curves, trade-offs, expert load.
std::vector<Chart> build_charts(const Study& study, const ReportOptions& options);

// The builders; each file has its own rows of table_kinds().
using Tables = std::vector<Table>;
Tables accuracy_tables(const Study& study, const ReportOptions& options);
Tables interval_tables(const Study& study, const ReportOptions& options);
Tables seed_tables(const Study& study, const ReportOptions& options);
Tables paired_tables(const Study& study, const ReportOptions& options);
Tables single_task_tables(const Study& study, const ReportOptions& options);
Tables multi_task_tables(const Study& study, const ReportOptions& options);
Tables rank_tables(const Study& study, const ReportOptions& options);
Tables router_coef_tables(const Study& study, const ReportOptions& options);
Tables paper_efficiency_tables(const Study& study, const ReportOptions& options);
Tables parameter_tables(const Study& study, const ReportOptions& options);
Tables efficiency_tables(const Study& study, const ReportOptions& options);
Tables memory_tables(const Study& study, const ReportOptions& options);
Tables time_tables(const Study& study, const ReportOptions& options);
Tables grid_tables(const Study& study, const ReportOptions& options);
Tables expert_load_tables(const Study& study, const ReportOptions& options);
Tables layer_load_tables(const Study& study, const ReportOptions& options);
Tables curve_tables(const Study& study, const ReportOptions& options);
Tables warning_tables(const Study& study, const ReportOptions& options);

// --- what the builders share ---

/// "Model X. Protocol label-token, metric acc, zero-shot, all rows, prompts to 512 tokens. Seeds 1,
/// 2, 3." for these trials' specs.
std::string protocol_text(const std::vector<Configuration>& configurations, const Variant& v);
/// protocol_text of the whole study and its first variant, after a blank; "" before any score.
std::string setting_text(const Study& study);
/// "accuracy" for the study's first variant, "accuracy-loglikelihood-acc_norm" for others.
std::string variant_name(const std::string& table, const Study& study, const Variant& v);
/// "73.2 ± 0.9" in percent, with the interval behind it.
Cell score_cell(const TwoLevel& level, Interval interval);
/// The mean over suites; marked with † and without a value when `asked` is more than are there.
Cell average_cell(const std::vector<Summary>& suites, std::size_t asked, double confidence);
inline constexpr const char* kIncomplete =
    " † mean over the suites scored so far, or over fewer seeds than were asked for: not to be "
    "compared with the others.";
/// The model's name: the last part of its path.
std::string model_name(const Study& study);

}  // namespace mixlora
