// op_bench: every case of the table under Google Benchmark, on each backend of this machine.
//
//   op_bench --benchmark_filter='cuda bf16/mixture'
//
// GB/s counts every array once, TFLOP/s the operations of the case; both are rates of real time.
// Calls of a batch are enqueued together and waited for once, so short kernels are not timed by
// their launch and wait.
#include <chrono>
#include <cstdio>

#include <benchmark/benchmark.h>

#include "kernels/cases/op_cases.h"

namespace {

using mixlora::Backend;
using mixlora::cases::OpCase;

constexpr std::uint64_t kSeed = 1;
constexpr int kBatch = 8;  // calls between two waits

void run(benchmark::State& state, Backend& ops, const OpCase& c) {
  mixlora::cases::Workbench w(ops, kSeed);
  c.prepare(w);
  w.run();
  ops.synchronize();
  for (auto _ : state) {
    const auto from = std::chrono::steady_clock::now();
    for (int i = 0; i < kBatch; ++i) w.run();
    ops.synchronize();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - from;
    state.SetIterationTime(took.count() / kBatch);
  }
  const auto rate = [&](double per_call) {
    return benchmark::Counter(per_call, benchmark::Counter::kIsIterationInvariantRate);
  };
  state.counters["GB/s"] = rate(w.bytes() * 1e-9);
  state.counters["TFLOP/s"] = rate(c.flops * 1e-12);
  state.counters["calls/s"] = rate(1);
}

void add(const std::string& name, Backend& ops, const std::vector<OpCase>& table) {
  std::printf("%s: %s\n", name.c_str(), ops.description().c_str());
  for (const OpCase& c : table)
    benchmark::RegisterBenchmark((name + '/' + c.name).c_str(),
                                 [&ops, &c](benchmark::State& s) { run(s, ops, c); })
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  const auto table = mixlora::cases::op_cases();
  std::vector<std::unique_ptr<Backend>> backends;
  const auto each = [&](const std::string& name, std::unique_ptr<Backend> ops) {
    add(name, *ops, table);
    backends.push_back(std::move(ops));
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
