#include "suites/task.h"

#include <algorithm>

#include "engine/error.h"
#include "engine/nearest.h"
#include "suites/starter.h"

namespace mixlora {

const std::vector<Task>& tasks() {
  static const std::vector<Task> kTasks{
      {"arc-e", "arc_easy", "ARC-e", PromptKind::question, "train", "test", false},
      {"arc-c", "arc_challenge", "ARC-c", PromptKind::question, "train", "test", false},
      {"boolq", "boolq", "BoolQ", PromptKind::boolq, "train", "validation", false},
      {"obqa", "openbookqa", "OBQA", PromptKind::question, "train", "test", false},
      {"piqa", "piqa", "PIQA", PromptKind::piqa, "train", "validation", false},
      {"siqa", "social_iqa", "SIQA", PromptKind::social_iqa, "train", "validation", false},
      {"hellaswag", "hellaswag", "HellaS", PromptKind::hellaswag, "train", "validation", false},
      {"winogrande", "winogrande", "WinoG", PromptKind::winogrande, "train_debiased", "validation",
       false},
      {"starter-question", "starter-question", "S-Quest", PromptKind::question, "train", "test",
       true},
      {"starter-truth", "starter-truth", "S-Truth", PromptKind::boolq, "train", "test", true},
      {"starter-solution", "starter-solution", "S-Solve", PromptKind::piqa, "train", "test", true},
      {"starter-blank", "starter-blank", "S-Blank", PromptKind::winogrande, "train", "test", true},
  };
  return kTasks;
}

const Task& find_task(std::string_view name) {
  std::vector<std::string> names;
  for (const Task& t : tasks()) {
    if (t.name == name || t.folder == name) return t;
    names.push_back(t.name);
  }
  fail("no task \"{}\"; {}", name, nearest(name, names));
}

Dataset load_split(const Task& task, bool train, std::int64_t limit) {
  const std::string& stem = train ? task.train_split : task.test_split;
  if (task.starter)
    return parse_dataset(starter_text(task.name, stem), task.name + "/" + stem, limit);
  const auto folder = data_directory() / task.folder;
  for (const char* ending : {".jsonl", ".jsonl.gz"})
    if (const auto file = folder / (stem + ending); std::filesystem::exists(file))
      return read_dataset(file, limit);
  fail("task {}: {}/{}.jsonl[.gz] is not there; set MIXLORA_DATA to the folder that holds {}/",
       task.name, folder.string(), stem, task.folder);
}

}  // namespace mixlora
