#include <cstdlib>
#include <iostream>
#include <random>
#include <regex>

#include "kernels/cases/op_cases.h"
#include "tests/support/catch.h"

namespace mixlora {
namespace {

void run_table(Backend& ops) {
  const std::uint64_t seed = std::random_device{}();
  const bool wide = ops.activation_type() == DType::f32 && ops.matrix_type() == DType::f32;
  std::cout << ops.description() << ": seed " << seed << '\n';
  const char* only = std::getenv("MIXLORA_CASES");  // names of cases by a regular expression
  for (const auto& c : cases::op_cases()) {
    if (only != nullptr && !std::regex_search(c.name, std::regex(only))) continue;
    const double bound = wide ? c.bound.f32 : c.bound.bf16;
    const auto found = cases::parity(ops, c, seed);
    INFO(c.name << ", " << found.array << ", seed " << seed << "; bound: " << c.bound.why);
    CHECK(found.error <= bound);
  }
}

}  // namespace

TEST_CASE("the CPU computes every operation as the double reference does", "[kernels][parity]") {
  run_table(*make_cpu_backend(Precision::fp32));
}

TEST_CASE("the CPU multiplying in bf16 stays within bf16's bounds", "[kernels][parity]") {
  const auto ops = make_cpu_backend(Precision::automatic);
  if (ops->matrix_type() != DType::bf16) {
    std::cout << "skipped: this CPU has no fast bf16 products\n";
    return;
  }
  run_table(*ops);
}

TEST_CASE("CUDA computes every operation as the double reference does", "[kernels][parity][cuda]") {
  if (const auto reason = cuda_unavailable_reason(); !reason.empty()) {
    std::cout << "skipped: " << reason << '\n';
    return;
  }
  SECTION("in f32") { run_table(*make_cuda_backend(Precision::fp32)); }
  SECTION("in bf16") { run_table(*make_cuda_backend(Precision::bf16)); }
}

}  // namespace mixlora
