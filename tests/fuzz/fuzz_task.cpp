// A task file: an accepted one has a name and names splits that it has.
#include "suites/task.h"
#include "tests/fuzz/target.h"

using namespace mixlora;

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  return accept_or_refuse([&] {
    const Task task = parse_task(text_of(data, size), "fuzz", "folder");
    must(!task.name.empty() && task.split(task.test_split).name == task.test_split);
  });
}
