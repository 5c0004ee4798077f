// op_bench: every case of the table under Google Benchmark, on each backend of this machine.
//
//   op_bench --benchmark_filter='cuda bf16/mixture'
//
// GB/s counts every array once, TFLOP/s the operations of the case; both are rates of real time.
// roof% is the share of the roofline: the time that the bytes or the operations take at the rates
// of a large copy and of a large product by frozen weights, measured in this run, over the time of
// the call. Arrays that fit a cache move faster than the copy, so small cases may exceed 100. Calls
// of a batch are enqueued together and waited for once, so short kernels are not timed by their
// launch and wait.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <deque>
#include <memory>
#include <optional>

#include <benchmark/benchmark.h>

#include "kernels/cases/op_cases.h"

namespace {

using mixlora::Backend;
using mixlora::cases::OpCase;

constexpr std::uint64_t kSeed = 1;
constexpr int kBatch = 8;  // calls between two waits

/// What a backend can do at most, as its own large copy and product do it.
struct Roof {
  double bytes_per_s = 0, flops = 0;
};

/// Seconds of one call: the fastest of some batches.
template <class F> double fastest(Backend& ops, F&& call) {
  double best = INFINITY;
  call();
  ops.synchronize();
  for (int i = 0; i < 5; ++i) {
    const auto from = std::chrono::steady_clock::now();
    for (int j = 0; j < kBatch; ++j) call();
    ops.synchronize();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - from;
    best = std::min(best, took.count() / kBatch);
  }
  return best;
}

Roof roof_of(Backend& ops) {
  const bool host = ops.device() == mixlora::Device::cpu;
  const std::int64_t numbers = std::int64_t{1} << (host ? 24 : 27), n = host ? 1024 : 4096,
                     rows = host ? 512 : 8192;
  mixlora::Arena arena("roof");
  mixlora::Tensor from, to, x, y;
  mixlora::FrozenMatrix w;
  w.out = w.in = n;
  w.dtype = ops.matrix_type();
  arena.declare("from", from, {numbers}, mixlora::DType::f32);
  arena.declare("to", to, {numbers}, mixlora::DType::f32);
  arena.declare("x", x, {rows, n}, ops.activation_type());
  arena.declare("y", y, {rows, n}, ops.activation_type());
  arena.declare("w", w.storage, {static_cast<std::int64_t>(ops.matrix_bytes(n, n) / 4)},
                mixlora::DType::i32);
  arena.commit(ops);
  ops.pack_matrix(w);
  Roof roof;
  roof.bytes_per_s =
      2.0 * static_cast<double>(from.bytes()) / fastest(ops, [&] { ops.copy(to, from); });
  roof.flops = 2.0 * static_cast<double>(rows * n * n) / fastest(ops, [&] { ops.linear(y, x, w); });
  return roof;
}

/// One backend and, once a case of it has run, its roof.
struct Subject {
  std::unique_ptr<Backend> ops;
  std::optional<Roof> roof;
};

void run(benchmark::State& state, Subject& subject, const OpCase& c) {
  Backend& ops = *subject.ops;
  if (!subject.roof) {
    subject.roof = roof_of(ops);
    std::printf("roof of the next: %.0f GB/s, %.2f TFLOP/s\n", 1e-9 * subject.roof->bytes_per_s,
                1e-12 * subject.roof->flops);
  }
  mixlora::cases::Workbench w(ops, kSeed);
  c.prepare(w);
  w.run();
  ops.synchronize();
  double seconds = 0, calls = 0;
  for (auto _ : state) {
    const auto from = std::chrono::steady_clock::now();
    for (int i = 0; i < kBatch; ++i) w.run();
    ops.synchronize();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - from;
    state.SetIterationTime(took.count() / kBatch);
    seconds += took.count();
    calls += kBatch;
  }
  const auto rate = [&](double per_call) {
    return benchmark::Counter(per_call, benchmark::Counter::kIsIterationInvariantRate);
  };
  state.counters["GB/s"] = rate(w.bytes() * 1e-9);
  state.counters["TFLOP/s"] = rate(c.flops * 1e-12);
  state.counters["calls/s"] = rate(1);
  const double least =
      std::max(w.bytes() / subject.roof->bytes_per_s, c.flops / subject.roof->flops);
  state.counters["roof%"] = 100 * least * calls / seconds;
}

void add(const std::string& name, Subject& subject, const std::vector<OpCase>& table) {
  std::printf("%s: %s\n", name.c_str(), subject.ops->description().c_str());
  for (const OpCase& c : table)
    benchmark::RegisterBenchmark((name + '/' + c.name).c_str(),
                                 [&subject, &c](benchmark::State& s) { run(s, subject, c); })
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  const auto table = mixlora::cases::op_cases();
  std::deque<Subject> subjects;  // a deque: benchmarks point into it
  const auto each = [&](const std::string& name, std::unique_ptr<Backend> ops) {
    add(name, subjects.emplace_back(Subject{std::move(ops), {}}), table);
  };
  each("cpu", mixlora::make_cpu_backend());
  if (const auto reason = mixlora::cuda_unavailable_reason(); reason.empty()) {
    each("cuda f32", mixlora::make_cuda_backend(mixlora::Precision::fp32));
    each("cuda bf16", mixlora::make_cuda_backend(mixlora::Precision::bf16));
  } else {
    std::printf("cuda: skipped: %s\n", reason.c_str());
  }
  benchmark::RunSpecifiedBenchmarks();
}
