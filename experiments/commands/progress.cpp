#include "experiments/commands/progress.h"

#include <algorithm>
#include <cstdio>

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "experiments/timing.h"

namespace mixlora {
namespace {

constexpr double kLineSeconds = 15, kLiveSeconds = 0.1;  // between two lines, two rewrites
constexpr std::size_t kBar = 20;

std::string bar(double share) {
  const auto full = static_cast<std::size_t>(std::clamp(share, 0.0, 1.0) * kBar + 0.5);
  std::string text;
  for (std::size_t i = 0; i < kBar; ++i) text += i < full ? "━" : "─";
  return text;
}

std::size_t columns() {
  winsize size{};
  if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

/// The first `n` characters of UTF-8 text.
std::string cut(const std::string& text, std::size_t n) {
  std::size_t at = 0;
  for (std::size_t seen = 0; at < text.size(); ++at)
    if ((static_cast<unsigned char>(text[at]) & 0xC0U) != 0x80U && seen++ == n) break;
  return text.substr(0, at);
}

}  // namespace

std::string clock_text(double seconds) {
  const auto s = static_cast<std::int64_t>(seconds + 0.5);
  if (s < 3600) return fmt::format("{}:{:02}", s / 60, s % 60);
  return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
}

Progress::Progress(std::size_t trials, std::size_t width)
    : terminal_(isatty(STDERR_FILENO) != 0), of_(trials), width_(width) {}

bool Progress::due() {
  const auto now = Clock::now();
  const double since = std::chrono::duration<double>(now - shown_).count();
  if (since < (terminal_ ? kLiveSeconds : kLineSeconds)) return false;
  shown_ = now;
  return true;
}

void Progress::line(const std::string& label, const std::string& text) {
  fmt::print(stderr, "{}[{}/{}] {:<{}}  {}\n", terminal_ ? "\r\x1b[K" : "",
             std::min(ended_ + 1, of_), of_, label, width_, text);
  std::fflush(stderr);
}

/// On a terminal the last line with a bar, else a plain line; both only when one is due.
void Progress::live(const std::string& text, double share) {
  if (!due()) return;
  if (!terminal_) {
    line(label_, text);
    return;
  }
  const std::string whole =
      fmt::format("[{}/{}] {}  {}  {}", std::min(ended_ + 1, of_), of_, label_, bar(share), text);
  fmt::print(stderr, "\r\x1b[K{}", cut(whole, columns() - 1));
  std::fflush(stderr);
}

void Progress::begin(const std::vector<const Trial*>& pack) {
  label_ = pack.front()->label;
  pack_ = pack.size();
  if (pack_ > 1) label_ += fmt::format(" +{}", pack_ - 1);
  seconds_ = loss_ = 0;
  tokens_ = step_ = 0;
  shown_ = Clock::now();
}

void Progress::step(const StepRecord& r) {
  tokens_ += r.tokens;
  if (r.step != step_) seconds_ += r.ms / 1000;
  step_ = r.step;
  if (r.job == 0) loss_ = r.loss;
  const auto done = static_cast<double>(r.step), all = static_cast<double>(r.steps);
  live(fmt::format("step {}/{}  loss {:.4f}  {:.0f} tokens/s  {} left", r.step, r.steps, loss_,
                   static_cast<double>(tokens_) / seconds_,
                   clock_text(seconds_ / done * (all - done))),
       done / all);
}

void Progress::trained(const TrainSummary& s) {
  line(label_, fmt::format("trained: {} steps, {} tokens in {}, {:.0f} tokens/s, loss {:.4f}, "
                           "{:.0f} MiB at most",
                           s.steps, s.tokens, clock_text(s.seconds),
                           static_cast<double>(s.tokens) / s.seconds, loss_,
                           static_cast<double>(s.peak_bytes) / 1048576.0));
}

void Progress::asked(const Trial& trial, const std::string& suite, std::size_t n, std::size_t of) {
  label_ = trial.label;
  live(fmt::format("{}  {}/{} asked", suite, n, of),
       of == 0 ? 1 : static_cast<double>(n) / static_cast<double>(of));
}

void Progress::score(const Trial& trial, const Evaluation& e) {
  line(trial.label, fmt::format("{:<16}  {:5.1f} ± {:.1f} %  (majority {:.1f}, {} rows)", e.suite,
                                100 * e.value, 100 * e.standard_error, 100 * e.majority, e.n));
}

void Progress::end(const Trial& trial, const std::string& status, const std::string& reason) {
  if (status != "done") {
    line(trial.label, (status == "out_of_memory" ? "out of memory" : status) + ": " + reason);
    if (status == "interrupted") return;
  }
  ++ended_;
}

void Progress::say(const std::string& text) {
  fmt::print(stderr, "{}{}\n", terminal_ ? "\r\x1b[K" : "", text);
  std::fflush(stderr);
}

}  // namespace mixlora
