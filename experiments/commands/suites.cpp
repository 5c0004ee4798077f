#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "engine/fields.h"
#include "experiments/commands/commands.h"
#include "reports/table.h"
#include "suites/dataset.h"
#include "suites/validate.h"

namespace mixlora {
namespace {

struct SuitesArguments {
  std::vector<std::string> names;
  std::string model = "models/smollm2-135m";
  std::int64_t limit = 512;
  bool json = false;
};

std::vector<Task> tasks_named(const std::vector<std::string>& names) {
  if (names.empty()) return tasks();
  std::vector<Task> out;
  for (const auto& name : mix_names(names)) out.push_back(find_task(name));
  return out;
}

bool is_there(const Task& task, const Split& split) {
  const std::string stem = split_path(task, split).string();
  return task.starter || std::filesystem::exists(stem + ".jsonl") ||
         std::filesystem::exists(stem + ".jsonl.gz");
}

std::string gold_text(const SplitReport& r) {
  std::string out;
  for (const double share : r.gold)
    out += fmt::format("{}{:.1f}", out.empty() ? "" : " ", 100 * share);
  return out;
}

int list(bool json) {
  Table t{"suites", "Suites", "", {"task", "about", "licence", "splits", "from"}, {}, {1, 2, 3, 4}};
  for (const Task& task : tasks()) {
    std::string splits;
    for (const Split& s : task.splits)
      splits += fmt::format("{}{} {}{}", splits.empty() ? "" : ", ", s.name, s.rows,
                            is_there(task, s) ? "" : " (absent)");
    t.rows.push_back({task.name, task.about, task.licence, splits,
                      task.starter ? "the program" : task.source.repository});
  }
  fmt::print("{}\n", render(t, json ? Format::json : Format::terminal));
  return kDone;
}

int validate(const SuitesArguments& o) {
  std::unique_ptr<Tokenizer> tokenizer;
  if (std::filesystem::exists(o.model + "/tokenizer.json"))
    tokenizer = std::make_unique<Tokenizer>(o.model);
  Table t{"validation",
          "Suites, held against what is on record",
          fmt::format("Gold: share of right answers by place (%). Repeated: rows that ask what an "
                      "earlier one asks. Seen: rows that the train split asks too. Prompts are "
                      "label-token's, {}.",
                      tokenizer == nullptr ? "not counted (--model names no tokenizer)"
                                           : "counted in tokens of " + o.model),
          {"split", "rows", "on record", "hash", "gold", "repeated", "seen", "longest",
           fmt::format("over {}", o.limit)},
          {},
          {3, 4}};
  int code = kDone;
  for (const Task& task : tasks_named(o.names)) {
    for (const Split& split : task.splits) {
      const std::string name = task.name + " " + split.name;
      const auto wrong = [&](const std::string& what) {
        fmt::print(stderr, "{}: {}\n", name, what);
        code = std::max(code, kFailed);
      };
      if (!is_there(task, split)) {
        wrong("not there: " + split_path(task, split).string() + ".jsonl");
        continue;
      }
      try {
        const SplitReport r = validate_split(task, split, tokenizer.get(), o.limit);
        std::string seen = "-";
        if (const Split& train = task.split(task.train_split);
            split.name == task.test_split && train.file != split.file && is_there(task, train))
          seen = std::to_string(overlap(load_split(task, train, 0), load_split(task, split, 0)));
        const bool counted = r.longest > 0;
        t.rows.push_back(
            {name, std::to_string(r.rows), r.expected > 0 ? std::to_string(r.expected) : "-",
             write(r.hash_state).get<std::string>(), gold_text(r), std::to_string(r.repeated), seen,
             counted ? std::to_string(r.longest) : "-",
             counted ? std::to_string(r.over_limit) : "-"});
        if (r.expected > 0 && r.rows != r.expected)
          wrong(fmt::format("{} rows, {} on record", r.rows, r.expected));
        if (r.hash_state == HashState::differs)
          wrong(fmt::format("hash {}, {} on record", r.hash, split.sha256));
      } catch (const InputError& e) {
        wrong(e.what());
        code = kBadInput;
      }
    }
  }
  fmt::print("{}\n", render(t, o.json ? Format::json : Format::terminal));
  return code;
}

}  // namespace

void add_suites_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<SuitesArguments>();  // the parser and the callbacks share it
  CLI::App* suites =
      app.add_subcommand("suites", "the suites there are, and whether they are right");
  suites->require_subcommand(1);
  CLI::App* listing = suites->add_subcommand("list", "every shipped task and its splits");
  listing->add_flag("--json", o->json, "for another program to read");
  listing->callback([=, &exit_code] { exit_code = list(o->json); });
  CLI::App* check = suites->add_subcommand(
      "validate", "counts, hashes, balance, repetitions, long prompts; exit 1 when one is wrong");
  check->add_option("suite", o->names, "tasks, task files or files of rows; all shipped ones");
  check->add_option("--model", o->model, "whose tokenizer counts prompts");
  check->add_option("--limit", o->limit, "tokens of a prompt")->check(CLI::PositiveNumber);
  check->add_flag("--json", o->json, "for another program to read");
  check->callback([=, &exit_code] { exit_code = validate(*o); });
}

}  // namespace mixlora
