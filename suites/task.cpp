#include "suites/task.h"

#include <algorithm>
#include <set>

#include "engine/nearest.h"
#include "engine/sha256.h"
#include "suites/shipped.h"
#include "suites/task_json.h"
#include "suites/text_template.h"

namespace mixlora {
namespace {

bool ends_with(std::string_view text, std::string_view ending) { return text.ends_with(ending); }

void check_name(const std::string& name, const std::string& where) {
  require(!name.empty(), "{}.name: missing", where);
  require(name.find_first_of(";/\\ \t\n") == std::string::npos,
          "{}.name: \"{}\": a name has no space, slash or semicolon", where, name);
}

void check_texts(const Task& t, const std::string& where) {
  const std::vector<std::string> prompt{"context", "question", "choices"},
      choice{"letter", "label", "choice"},
      request{"context", "question", "choice", "before_blank", "after_blank"};
  check_template(t.label_token.prompt, prompt, where + ".label_token.prompt");
  check_template(t.label_token.passage_prompt, prompt, where + ".label_token.passage_prompt");
  check_template(t.label_token.choice, choice, where + ".label_token.choice");
  check_template(t.loglikelihood.context, request, where + ".loglikelihood.context");
  check_template(t.loglikelihood.continuation, request, where + ".loglikelihood.continuation");
  require(!t.label_token.prompt.empty() || !t.loglikelihood.context.empty(),
          "{}: neither label_token.prompt nor loglikelihood.context: nothing to ask", where);
  const auto& labels = t.label_token.official;
  require(std::set<std::string>(labels.begin(), labels.end()).size() == labels.size(),
          "{}.label_token.official: a label stands twice", where);
  const std::vector<std::string> known{"acc", "acc_norm", "acc_bytes"};
  const auto& metrics = t.loglikelihood.metrics;
  for (const auto& m : metrics)
    require(std::find(known.begin(), known.end(), m) != known.end(),
            "{}.loglikelihood.metrics: no metric \"{}\"; {}", where, m, nearest(m, known));
  require(std::find(metrics.begin(), metrics.end(), t.loglikelihood.headline) != metrics.end(),
          "{}.loglikelihood.headline: \"{}\" is not among its metrics", where,
          t.loglikelihood.headline);
}

void check(const Source& s, const std::string& where) {
  if (s.repository.empty()) return;
  require(!s.question.empty() && !s.answer.empty(), "{}: needs columns \"question\" and \"answer\"",
          where);
  require(s.choices.empty() != s.fixed_choices.empty(),
          "{}: needs either \"choices\" or \"fixed_choices\"", where);
  require(s.fixed_labels.empty() || s.fixed_labels.size() == s.fixed_choices.size(),
          "{}.fixed_labels: {} for {} choices", where, s.fixed_labels.size(),
          s.fixed_choices.size());
}

void check(const Task& t, const std::string& where) {
  check_name(t.name, where);
  require(t.choices.empty() ||
              (t.choices.size() == 2 && t.choices[0] >= 2 && t.choices[0] <= t.choices[1]),
          "{}.choices: expected [fewest, most], 2 or more", where);
  std::set<std::string> names;
  for (std::size_t i = 0; i < t.splits.size(); ++i) {
    const Split& s = t.splits[i];
    const std::string at = fmt::format("{}.splits[{}]", where, i);
    require(!s.name.empty() && !s.file.empty(), "{}: needs a name and a file", at);
    require(names.insert(s.name).second, "{}: the split \"{}\" stands twice", at, s.name);
    require(s.rows >= 0, "{}.rows: {}; expected 0 (not stated) or more", at, s.rows);
    require(
        s.sha256.empty() || (s.sha256.size() == 64 &&
                             s.sha256.find_first_not_of("0123456789abcdef") == std::string::npos),
        "{}.sha256: \"{}\"; expected 64 hexadecimal digits", at, s.sha256);
  }
  require(names.count(t.test_split) != 0, "{}.test: no split \"{}\"", where, t.test_split);
  require(names.count(t.train_split) != 0, "{}.train: no split \"{}\"", where, t.train_split);
  require(t.few_shot_split.empty() || names.count(t.few_shot_split) != 0,
          "{}.few_shot: no split \"{}\"", where, t.few_shot_split);
  check_texts(t, where);
  check(t.source, where + ".source");
}

/// A file of rows without a task of its own: a question with lettered choices.
Task task_of_rows(const std::filesystem::path& file) {
  const auto home = file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
  Task t = parse_task(shipped_text("rows.json"), "rows.json", home);
  const std::string name = file.filename().string();
  std::string stem = name.substr(0, name.rfind(".jsonl"));
  t.name = t.column = stem;
  for (Split& s : t.splits) s.file = stem;
  return t;
}

}  // namespace

const Split& Task::split(std::string_view split_name) const {
  std::vector<std::string> names;
  for (const Split& s : splits) {
    if (s.name == split_name) return s;
    names.push_back(s.name);
  }
  fail("task {}: no split \"{}\"; {}", name, split_name, nearest(split_name, names));
}

Task parse_task(std::string_view text, const std::string& file, const std::filesystem::path& home) {
  Task t;
  read(parse_json(text, file), t, file);
  check(t, file);
  if (t.column.empty()) t.column = t.name;
  t.home = home;
  return t;
}

const std::vector<Task>& tasks() {
  static const std::vector<Task> kTasks = [] {
    std::vector<Task> all;
    for (const auto& path : shipped_tasks())
      all.push_back(parse_task(shipped_text(path), path, {}));
    return all;
  }();
  return kTasks;
}

Task find_task(std::string_view name) {
  if (ends_with(name, ".json")) {
    const std::filesystem::path file(name);
    const auto home = file.has_parent_path() ? file.parent_path() : std::filesystem::path(".");
    return parse_task(read_text(file, std::size_t{1} << 20), file.string(), home);
  }
  if (ends_with(name, ".jsonl") || ends_with(name, ".jsonl.gz")) {
    require(std::filesystem::exists(name), "{}: no such file of rows", name);
    return task_of_rows(name);
  }
  std::vector<std::string> names;
  for (const Task& t : tasks()) {
    if (t.name == name || std::find(t.aliases.begin(), t.aliases.end(), name) != t.aliases.end())
      return t;
    names.push_back(t.name);
  }
  fail("no task \"{}\"; {}", name, nearest(name, names));
}

std::vector<std::string> mix_names(const std::vector<std::string>& names) {
  std::vector<std::string> out;
  for (const std::string& mix : names)
    for (std::size_t at = 0; at <= mix.size();) {
      const std::size_t end = std::min(mix.find(';', at), mix.size());
      const std::string one = mix.substr(at, end - at);
      const std::size_t from = one.find_first_not_of(' ');
      require(from != std::string::npos, "the mix \"{}\" has an empty name in it", mix);
      out.push_back(one.substr(from, one.find_last_not_of(' ') - from + 1));
      at = end + 1;
    }
  return out;
}

std::filesystem::path split_path(const Task& task, const Split& split) {
  return (task.home.empty() ? data_directory() : task.home) / task.folder / split.file;
}

std::filesystem::path split_file(const Task& task, const Split& split) {
  const auto stem = split_path(task, split);
  for (const char* ending : {".jsonl", ".jsonl.gz"})
    if (auto file = stem; std::filesystem::exists(file += ending)) return file;
  if (!task.home.empty())
    fail("task {}: split \"{}\": neither {}.jsonl nor {}.jsonl.gz is there", task.name, split.name,
         stem.string(), stem.string());
  fail(
      "task {}: split \"{}\": neither {}.jsonl nor {}.jsonl.gz is there; bring it with "
      "`mixlora-bench fetch suites {}`, or set MIXLORA_DATA to the folder that holds {}/",
      task.name, split.name, stem.string(), stem.string(), task.name, task.folder);
}

Dataset load_split(const Task& task, const Split& split, std::int64_t limit) {
  Dataset d = task.starter ? parse_dataset(shipped_text(task.folder + "/" + split.file + ".jsonl"),
                                           task.name + "/" + split.name, limit)
                           : read_dataset(split_file(task, split), limit);
  for (std::size_t i = 0; i < d.rows.size() && !task.choices.empty(); ++i) {
    const auto n = static_cast<std::int64_t>(d.rows[i].choices.size());
    require(n >= task.choices[0] && n <= task.choices[1],
            "{}: row {}: {} choices; task {} has {} to {}", d.file, d.rows[i].id, n, task.name,
            task.choices[0], task.choices[1]);
  }
  Json asked = write(task);  // what is asked belongs to the data's identity; words about it do not
  for (const char* words : {"aliases", "column", "about", "licence", "folder", "splits", "source"})
    asked.erase(words);
  d.hash = sha256(d.hash + "\n" + asked.dump());
  return d;
}

Dataset load_split(const Task& task, bool train, std::int64_t limit) {
  return load_split(task, task.split(train ? task.train_split : task.test_split), limit);
}

}  // namespace mixlora
