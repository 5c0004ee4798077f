// TimedBackend: what a step's calls belong to, and that timing them changes nothing.
#include "kernels/timed_backend.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/trace.h"
#include "tests/support/catch.h"

using namespace mixlora;

namespace {

/// Two numbers on the CPU.
struct Pair {
  std::vector<float> numbers{1, 2};
  Tensor view() { return {numbers.data(), {2}, DType::f32, Device::cpu}; }
};

void step(Backend& ops, Pair& x, Pair& y) {
  const trace::Range outer(ops, "step", 1);
  ops.zero(y.view());
  {
    const trace::Range forward(ops, "forward");
    const trace::Range layer(ops, "layer", 3);
    ops.add(y.view(), x.view());
  }
  {
    const trace::Range backward(ops, "backward");
    const trace::Range layer(ops, "layer", 2);
    const trace::Range again(ops, "recompute");
    ops.add(y.view(), x.view());
  }
  const trace::Range loss(ops, "loss");
  ops.add(y.view(), x.view());
}

}  // namespace

TEST_CASE("a timed call knows its phase, layer and family", "[kernels][trace]") {
  TimedBackend timed(make_cpu_backend(Precision::fp32));
  Pair x, y;
  step(timed, x, y);
  CHECK(timed.steps().empty());  // nobody asked
  timed.measure(true);
  step(timed, x, y);
  step(timed, x, y);
  timed.measure(false);
  step(timed, x, y);
  timed.add(y.view(), x.view());  // outside a step
  REQUIRE(timed.steps().size() == 2);
  for (const TimedStep& s : timed.steps()) {
    REQUIRE(s.calls.size() == 4);
    const auto is = [&](std::size_t i, const char* op, Family f, Phase p, std::int64_t layer) {
      INFO("call " << i);
      CHECK(std::string(s.calls[i].op) == op);
      CHECK(s.calls[i].family == f);
      CHECK(s.calls[i].phase == p);
      CHECK(s.calls[i].layer == layer);
    };
    is(0, "zero", Family::copies, Phase::other, -1);
    is(1, "add", Family::copies, Phase::forward, 3);
    is(2, "add", Family::copies, Phase::recompute, 2);
    is(3, "add", Family::loss, Phase::loss, -1);
    double calls = 0;
    for (const TimedCall& c : s.calls) {
      CHECK(c.seconds > 0);
      calls += c.seconds;
    }
    CHECK(calls <= s.seconds);
    CHECK(s.seconds <= s.wall);
  }
  CHECK(y.numbers == std::vector<float>{4, 8});  // three times x, and once more
}

TEST_CASE("a step that throws leaves no times and closes its ranges", "[kernels][trace]") {
  TimedBackend timed(make_cpu_backend(Precision::fp32));
  timed.measure(true);
  const auto broken = [&] {
    const trace::Range outer(timed, "step");
    const trace::Range layer(timed, "layer", 7);
    throw std::runtime_error("a failed call");
  };
  CHECK_THROWS(broken());
  CHECK(timed.steps().empty());
  Pair x, y;
  step(timed, x, y);
  REQUIRE(timed.steps().size() == 1);
  CHECK(timed.steps()[0].calls[0].layer == -1);
}
