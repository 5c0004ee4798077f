// The table of op cases: what parity tests and benchmarks run, on any backend.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "kernels/cases/workbench.h"

namespace mixlora::cases {

/// How far a backend may be from the double reference, by Workbench::error of every output, when
/// its activations are f32 or bf16, and why that much.
struct Bound {
  double f32, bf16;
  const char* why;
};
/// eps32 = 6e-8, eps16 = 3.9e-3 / 2 (unit round-off of bf16).
inline constexpr Bound kExact{0, 0, "indices and copies: no arithmetic"};
inline constexpr Bound kRounded{
    1e-6, 4e-3,
    "a handful of f32 roundings; bf16: one rounding of the result, eps16 at most, and "
    "one more where it is added to"};
inline constexpr Bound kSummed{
    5e-6, 4e-3,
    "sums of up to 1e5 f32 terms in blocks, cancellation of a few digits; bf16: inputs "
    "are exact in bf16, f32 accumulation, one or two roundings of the result"};
inline constexpr Bound kChained{
    2e-5, 1.2e-2,
    "several sums, exp and products behind one another, each amplifying the last; bf16: "
    "up to six intermediate numbers (probabilities, h, dh) rounded to bf16 for the "
    "tensor cores"};

struct OpCase {
  std::string name;  // operation and shape: "rmsnorm 33x257"
  Bound bound;
  double flops;  // of one call
  std::function<void(Workbench&)> prepare;
};

/// All cases, in the order of backend.h.
std::vector<OpCase> op_cases();

struct Parity {
  double error = 0;   // of the worst output
  std::string array;  // its name
};
/// Prepares, runs and compares one case with fresh numbers from `seed`.
Parity parity(Backend& ops, const OpCase& c, std::uint64_t seed);

void add_product_cases(std::vector<OpCase>& table);
void add_row_cases(std::vector<OpCase>& table);
void add_low_rank_cases(std::vector<OpCase>& table);
void add_attention_cases(std::vector<OpCase>& table);
void add_router_cases(std::vector<OpCase>& table);
void add_mixture_cases(std::vector<OpCase>& table);
void add_training_cases(std::vector<OpCase>& table);

/// "33x257"
std::string times(std::initializer_list<std::int64_t> extents);

}  // namespace mixlora::cases
