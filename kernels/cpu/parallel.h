// Rows in parallel, and functions compiled for several instruction sets.
#pragma once
#include <cstdint>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && \
    !defined(__SANITIZE_ADDRESS__)
/// One body, compiled for AVX-512, AVX2 and the baseline; the loader picks.
#define MIXLORA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MIXLORA_CLONES
#endif

namespace mixlora::cpu {

/// f(i) for i in [0, n); each i is independent, so the number of threads changes no result.
template <class F> void parallel_for(std::int64_t n, F&& f) {
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < n; ++i) f(i);
}
/// As parallel_for, for tasks of unequal length.
template <class F> void parallel_tasks(std::int64_t n, F&& f) {
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t i = 0; i < n; ++i) f(i);
}

}  // namespace mixlora::cpu
