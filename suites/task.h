// Task: one suite as data: where its rows are, what is asked, how answers are scored. See
// tasks/*.json.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "suites/dataset.h"
#include "suites/source.h"

namespace mixlora {

/// Which strings compete in the label-token protocol.
enum class LabelKind : std::uint8_t { letters, row };  // A, B, ... by place; the row's own labels
/// What is done to the texts of the loglikelihood protocol.
enum class Cleaning : std::uint8_t { none, hellaswag };

struct Split {
  std::string name;
  std::string file;              // stem; .jsonl or .jsonl.gz follows
  std::int64_t rows = 0;         // the official count; 0: not stated
  std::string sha256;            // of the rows' contents (content_hash); empty: not on record
  std::string edition;           // which text the hash is of, where it is not the official file's
  std::string config, official;  // at the source, where they are not the task's and the name
};

/// How the label-token protocol asks a row. Templates: see text_template.h.
struct LabelTokenTexts {
  std::string prompt;                          // of context, question, choices
  std::string passage_prompt;                  // the same with its passage; empty: it has none
  std::string choice = "({letter}) {choice}";  // one choice, of letter, label, choice
  std::string separator = " ";                 // between two choices
  LabelKind labels = LabelKind::letters;
  std::vector<std::string> official;  // labels that compete under the official rule
};

/// How the loglikelihood protocol asks a row, as a task of lm-evaluation-harness.
struct LoglikelihoodTexts {
  std::string task;                       // lm-eval's name and version; empty: it has none
  std::string context;                    // of context, question, choice, before_blank, after_blank
  std::string continuation = "{choice}";  // as context
  std::string delimiter = " ";            // before the continuation
  Cleaning cleaning = Cleaning::none;
  std::vector<std::string> metrics{"acc"};  // acc, acc_norm (by characters), acc_bytes
  std::string headline = "acc";             // the one that tables show
};

struct Task {
  std::string name;  // "arc-e"
  std::vector<std::string> aliases;
  std::string column;  // heading in tables: "ARC-e"
  std::int64_t version = 1;
  std::string about, licence;
  std::string folder;                 // below the data directory, or below the task file's folder
  bool starter = false;               // shipped with the program, not a published benchmark
  std::vector<std::int64_t> choices;  // fewest and most a row may have; empty: 2 or more
  std::vector<Split> splits;
  std::string train_split = "train", test_split = "test", few_shot_split;  // names of splits
  LabelTokenTexts label_token;
  LoglikelihoodTexts loglikelihood;
  Source source;

  std::filesystem::path home;  // folder of an own task's file; empty: a shipped task

  const Split& split(std::string_view split_name) const;  // throws InputError
};

/// The shipped tasks, in the paper's order, the starter suites after them.
const std::vector<Task>& tasks();
/// By name or alias ("arc-e", "arc_easy"), by a task's JSON file or by a file of rows (.jsonl,
/// .jsonl.gz); throws InputError with the nearest name.
Task find_task(std::string_view name);
/// Reads one task's JSON; `file` is what errors call it, `home` where its splits lie.
Task parse_task(std::string_view text, const std::string& file, const std::filesystem::path& home);
/// The names in a mix: "a;b;c" is a, b and c.
std::vector<std::string> mix_names(const std::vector<std::string>& names);

/// Where a split lies, whether or not it is there (".jsonl" left off); starter suites lie in the
/// program.
std::filesystem::path split_path(const Task& task, const Split& split);
/// The file of a split that is there; throws InputError which says what was looked for and how to
/// get it.
std::filesystem::path split_file(const Task& task, const Split& split);
/// A split's rows, every one checked against the task. The hash is of file and task together.
Dataset load_split(const Task& task, const Split& split, std::int64_t limit);
/// "train" or "test" as the task names them.
Dataset load_split(const Task& task, bool train, std::int64_t limit);

}  // namespace mixlora
