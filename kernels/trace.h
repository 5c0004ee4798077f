// Named ranges for Nsight, in the domain "mixlora"; nothing where NVTX is absent.
#pragma once
#if __has_include(<nvtx3/nvtx3.hpp>)
#include <nvtx3/nvtx3.hpp>
namespace mixlora::trace {
struct Domain {
  static constexpr char const* name{"mixlora"};
};
using Range = nvtx3::scoped_range_in<Domain>;
}  // namespace mixlora::trace
#else
namespace mixlora::trace {
struct Range {
  explicit Range(const char*) {}
};
}  // namespace mixlora::trace
#endif
