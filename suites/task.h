// Task: one suite: where its rows are, what its prompt says, how it is scored.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "suites/dataset.h"

namespace mixlora {

/// How a row becomes a prompt of the label-token protocol.
enum class PromptKind : std::uint8_t { question, boolq, piqa, social_iqa, hellaswag, winogrande };

struct Task {
  std::string name;    // "arc-e"
  std::string folder;  // below the data directory
  std::string column;  // heading in tables: "ARC-e"
  PromptKind prompt = PromptKind::question;
  std::string train_split, test_split;  // file stems
  bool starter = false;                 // shipped with the program, not a published benchmark
};

/// All known tasks, in the paper's order, the shipped starter suites after them.
const std::vector<Task>& tasks();
/// By name or folder ("arc-e", "arc_easy"); throws InputError with the nearest name.
const Task& find_task(std::string_view name);
/// A split's rows: "train" or "test". Starter suites come from the program itself.
Dataset load_split(const Task& task, bool train, std::int64_t limit);

}  // namespace mixlora
