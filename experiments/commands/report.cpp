#include "reports/report.h"

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "engine/error.h"
#include "engine/json_file.h"
#include "experiments/commands/commands.h"
#include "experiments/commands/statistics_options.h"
#include "experiments/store/store.h"
#include "reports/page.h"

namespace mixlora {
namespace {

struct ReportArguments {
  std::string file, sweep, out, format = "terminal", html;
  std::vector<std::string> only;
  bool list = false;
  ReportOptions report;
};

int list_tables() {
  for (const TableKind& k : table_kinds())
    fmt::print("{:<20} {}{}\n", k.name, k.what, k.brief ? "" : " (with --only, --out or --html)");
  return kDone;
}

int report(const ReportArguments& o) {
  if (o.list) return list_tables();
  require(!o.file.empty(), "report: no store given; expected runs/NAME.db or the sweep file");
  const Format format = format_named(o.format);
  std::vector<const TableKind*> kinds;
  for (const auto& name : o.only) kinds.push_back(&find_table_kind(name));
  if (kinds.empty())
    for (const TableKind& k : table_kinds()) kinds.push_back(&k);
  Database db = open_store(store_of(o.file));
  const Study study = read_study(db, last_sweep(db, o.sweep));
  // Everything is made before anything is written, and written before anything is printed.
  std::vector<Tables> made;
  for (const TableKind* kind : kinds) made.push_back(kind->build(study, o.report));
  if (!o.html.empty()) write_text(o.html, render_page(study, o.report));
  if (!o.out.empty())
    for (const Tables& tables : made)
      for (const Table& t : tables) write_table(t, o.out);
  Json all = Json::array();
  bool first = true;
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    const TableKind* kind = kinds[i];
    if (made[i].empty() && !o.only.empty())
      fmt::print(stderr, "report: {}: this sweep has nothing for it ({})\n", kind->name,
                 kind->what);
    for (const Table& t : made[i]) {
      if (o.only.empty() && !kind->brief && format != Format::json) continue;
      if (format == Format::json) {
        all.push_back(to_json(t));
        continue;
      }
      fmt::print("{}{}", first ? "" : "\n", render(t, format));
      first = false;
    }
  }
  if (format == Format::json) fmt::print("{}\n", all.dump(1));
  return kDone;
}

}  // namespace

void add_report_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<ReportArguments>();  // the parser and the callback share it
  CLI::App* command = app.add_subcommand("report", "print the tables of a store's last sweep");
  command->add_option("db", o->file, "store, or the sweep file whose store is runs/NAME.db");
  command->add_option("--only", o->only, "these tables alone (--list names them)")->delimiter(',');
  command->add_option("--format", o->format, "terminal, markdown, csv, latex or json");
  command->add_option("--out", o->out, "also write every table as .md, .csv, .tex, .json here");
  command->add_option("--html", o->html, "also write one page with all tables and charts");
  command->add_option("--sweep", o->sweep, "the last sweep with this name");
  command->add_option(
      "--against", o->report.reference,
      "the trial or method that others are tested against (default: the first trained)");
  command->add_flag("--list", o->list, "say which tables there are");
  add_certainty_options(*command, o->report.certainty);
  command->callback([=, &exit_code] { exit_code = report(*o); });
}

}  // namespace mixlora
