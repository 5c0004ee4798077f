// Program: mixlora-bench itself, run as a user would, in a folder with a tiny model.
#pragma once
#include <chrono>
#include <csignal>
#include <functional>
#include <string>
#include <vector>

#include "experiments/store/store.h"
#include "tests/experiments/folder.h"
#include "tests/experiments/tiny_model.h"

namespace mixlora {

struct Output {
  int code = 0;  // exit code; 128 + signal when killed
  std::string out, err;
};

class Program {
 public:
  Program();
  const std::filesystem::path& folder() const { return folder_.path; }
  /// Writes a file of the folder.
  void write(const std::string& name, const std::string& text) const;
  /// The tiny model's sweep: `methods` in fp32 on a starter suite, `more` merged over it.
  void write_sweep(const std::string& name, const std::vector<std::string>& methods,
                   const std::string& more = "{}") const;
  Output run(const std::vector<std::string>& arguments) const;
  /// As run, with `signal` sent after `seconds`; a run that ends before is left alone.
  Output run_and_signal(const std::vector<std::string>& arguments, int signal,
                        double seconds) const;

 private:
  Folder folder_;
};

/// Every loss and every answer of a store's finished trials, bit for bit, by the trial's label.
std::string results_of(const std::filesystem::path& store);
std::int64_t count_of(const std::filesystem::path& store, const std::string& sql);

}  // namespace mixlora
