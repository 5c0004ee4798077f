// Time marks on the stream, and the window of a profiler that waits for it.
#include <cuda_profiler_api.h>

#include "kernels/cuda/cuda_backend.h"

namespace mixlora {
namespace {

using cuda::check;

/// Events of the stream; made once and used again.
class EventMarks final : public TimeMarks {
 public:
  explicit EventMarks(cudaStream_t stream) : stream_(stream) {
    while (events_.size() < kFirst) make();
  }
  ~EventMarks() override {
    for (cudaEvent_t e : events_) cudaEventDestroy(e);
  }
  EventMarks(const EventMarks&) = delete;
  EventMarks& operator=(const EventMarks&) = delete;
  std::size_t mark() override {
    if (used_ == events_.size()) make();
    check(cudaEventRecord(events_[used_], stream_), "a time mark");
    return used_++;
  }
  double seconds(std::size_t from, std::size_t to) const override {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events_.at(from), events_.at(to)), "the time between marks");
    return static_cast<double>(ms) / 1000;
  }
  void clear() override { used_ = 0; }

 private:
  static constexpr std::size_t kFirst = 8192;  // of a usual step: made before it is timed
  void make() {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "an event");
    events_.push_back(event);
  }

  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;
  std::size_t used_ = 0;
};

}  // namespace

std::unique_ptr<TimeMarks> CudaBackend::time_marks() {
  return std::make_unique<EventMarks>(stream_);
}

void CudaBackend::profiler_window(bool open) {
  synchronize();
  check(open ? cudaProfilerStart() : cudaProfilerStop(), "the profiler's window");
}

}  // namespace mixlora
