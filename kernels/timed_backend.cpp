#include "kernels/timed_backend.h"

#include <exception>
#include <string_view>
#include <utility>

namespace mixlora {
namespace {

double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

const char* name_of(Family f) {
  constexpr std::array<const char*, kFamilies> kNames{
      "frozen products", "adapter products", "attention", "norms",     "mixture", "router",
      "DoRA scales",     "dropout",          "loss",      "optimizer", "copies"};
  return kNames.at(static_cast<std::size_t>(f));
}
const char* name_of(Phase p) {
  constexpr std::array<const char*, kPhases> kNames{"forward",   "loss",      "backward",
                                                    "recompute", "optimizer", "other"};
  return kNames.at(static_cast<std::size_t>(p));
}

void TimedBackend::enter(const char* range, std::int64_t index) {
  inner_.enter(range, index);
  around_.push_back(here_);
  const std::string_view name = range;
  here_.step = name == "step";
  for (std::size_t p = 0; p < kPhases; ++p)
    if (name == name_of(static_cast<Phase>(p))) here_.phase = static_cast<Phase>(p);
  if (name == "layer") here_.layer = index;
  if (!here_.step || !measuring_) return;
  in_step_ = true;
  step_ = {};
  marks_->clear();
  step_began_ = std::chrono::steady_clock::now();
  marks_->mark();
}

void TimedBackend::leave() {
  if (here_.step && in_step_) {
    in_step_ = false;
    if (std::uncaught_exceptions() == 0) finish_step();  // else the step is not worth its times
  }
  here_ = around_.back();
  around_.pop_back();
  inner_.leave();
}

void TimedBackend::begin(Family family, const char* op) {
  if (here_.phase == Phase::loss) family = Family::loss;
  inner_.enter(name_of(family), -1);
  step_.calls.push_back({op, family, here_.phase, here_.layer, 0, 0});
  marks_->mark();
  call_began_ = std::chrono::steady_clock::now();
}

void TimedBackend::end() {
  step_.calls.back().host = since(call_began_);
  marks_->mark();
  inner_.leave();
}

void TimedBackend::finish_step() {
  const std::size_t last = marks_->mark();
  inner_.synchronize();
  step_.wall = since(step_began_);
  for (std::size_t i = 0; i < step_.calls.size(); ++i)
    step_.calls[i].seconds = marks_->seconds(2 * i + 1, 2 * i + 2);
  step_.seconds = marks_->seconds(0, last);
  steps_.push_back(std::move(step_));
}

}  // namespace mixlora
