#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"
#include "experiments/store/store.h"
#include "reports/report.h"

namespace mixlora {
namespace {

struct Line {
  std::string label, status, reason, started, ended;
  std::int64_t step = 0, answers = 0;
  double loss = 0;
};

/// The sweep's trials, each with its newest attempt.
std::vector<Line> lines_of(Database& db) {
  std::vector<Line> out;
  Statement(
      db,
      "SELECT r.label, r.status, r.reason, coalesce(a.started, ''), coalesce(a.ended, ''), "
      "coalesce((SELECT max(step) FROM step WHERE attempt = a.id), 0), "
      "coalesce((SELECT loss FROM step WHERE attempt = a.id ORDER BY step DESC LIMIT 1), 0), "
      "(SELECT count(*) FROM answer WHERE attempt = a.id) "
      "FROM result r LEFT JOIN attempt a ON a.id = (SELECT max(id) FROM attempt WHERE trial = "
      "r.trial) WHERE r.sweep = ? ORDER BY r.position")
      .rows<std::string, std::string, std::string, std::string, std::string, std::int64_t, double,
            std::int64_t>(
          [&](std::string label, std::string status, std::string reason, std::string started,
              std::string ended, std::int64_t step, double loss, std::int64_t answers) {
            out.push_back({std::move(label), std::move(status), std::move(reason),
                           std::move(started), std::move(ended), step, answers, loss});
          },
          last_sweep(db));
  return out;
}

int status(const std::string& file, bool json) {
  // A sweep file stands for its store.
  const std::filesystem::path path =
      file.ends_with(".json") ? store_file(read_sweep(file), "") : std::filesystem::path(file);
  Database db = open_store(path);
  const bool running = is_being_written(path);
  std::vector<Line> lines = lines_of(db);
  std::size_t width = 5;
  for (Line& l : lines) {
    width = std::max(width, l.label.size());
    if (l.status == "running" && !running) {  // killed: the next run will say so in the store too
      l.status = "interrupted";
      l.reason = "the process ended";
    }
  }
  Json list = Json::array();
  for (const Line& l : lines) {
    if (json) {
      list.push_back({{"label", l.label},
                      {"status", l.status},
                      {"reason", l.reason},
                      {"started", l.started},
                      {"ended", l.ended},
                      {"step", l.step},
                      {"loss", l.loss},
                      {"answers", l.answers}});
      continue;
    }
    std::string what = l.step > 0 ? fmt::format("step {}, loss {:.4f}", l.step, l.loss) : "";
    if (l.answers > 0) what += fmt::format("{}{} answers", what.empty() ? "" : ", ", l.answers);
    fmt::print("{:<{}}  {:<13}  {}{}{}\n", l.label, width, l.status, what,
               what.empty() || l.reason.empty() ? "" : "; ", l.reason);
  }
  if (json)
    fmt::print("{}\n", Json{{"running", running}, {"trials", list}}.dump(2));
  else if (running)
    fmt::print("a run is writing to {}\n", path.string());
  return kDone;
}

}  // namespace

void add_status_command(CLI::App& app, int& exit_code) {
  struct StatusArguments {
    std::string file;
    bool json = false;
  };
  const auto o = std::make_shared<StatusArguments>();  // the parser and the callback share it
  CLI::App* command =
      app.add_subcommand("status", "the trials of a store's last sweep, also while it runs");
  command->add_option("db", o->file, "store, or the sweep file whose store is runs/NAME.db")
      ->required();
  command->add_flag("--json", o->json, "for another program to read");
  command->callback([=, &exit_code] { exit_code = status(o->file, o->json); });
}

}  // namespace mixlora
