// Progress: what a run says while it works: on a terminal one line that is rewritten, else plain
// lines now and then. It goes to stderr, tables go to stdout.
#pragma once
#include <chrono>
#include <string>
#include <vector>

#include "experiments/runner.h"

namespace mixlora {

/// "1:05", "2:03:09".
std::string clock_text(double seconds);

class Progress {
 public:
  /// `trials` run in all; `width` columns are kept for their labels.
  Progress(std::size_t trials, std::size_t width);
  void begin(const std::vector<const Trial*>& pack);
  void step(const StepRecord& r);
  void trained(const TrainSummary& s);
  void asked(const Trial& trial, const std::string& suite, std::size_t n, std::size_t of);
  void score(const Trial& trial, const Evaluation& e);
  void end(const Trial& trial, const std::string& status, const std::string& reason);
  /// A line of its own.
  void say(const std::string& text);

 private:
  void live(const std::string& text, double share);
  void line(const std::string& label, const std::string& text);
  bool due();

  bool terminal_;
  std::size_t of_, width_, ended_ = 0, pack_ = 1;
  std::string label_;
  std::chrono::steady_clock::time_point shown_;
  double seconds_ = 0;
  std::int64_t tokens_ = 0, step_ = 0;
  double loss_ = 0;
};

}  // namespace mixlora
