#include "kernels/trace.h"

#include <chrono>
#include <vector>

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define MIXLORA_NVTX
#endif

namespace mixlora {
namespace {

#ifdef MIXLORA_NVTX
/// Null when no profiler listens: NVTX's own calls do nothing then, and ours not even fill in what
/// they would take.
nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("mixlora");
  return handle;
}
#endif

class HostMarks final : public TimeMarks {
 public:
  std::size_t mark() override {
    at_.push_back(std::chrono::steady_clock::now());
    return at_.size() - 1;
  }
  double seconds(std::size_t from, std::size_t to) const override {
    return std::chrono::duration<double>(at_.at(to) - at_.at(from)).count();
  }
  void clear() override { at_.clear(); }

 private:
  std::vector<std::chrono::steady_clock::time_point> at_;
};

}  // namespace

#ifdef MIXLORA_NVTX
bool trace::attached() { return domain() != nullptr; }

void Backend::enter(const char* range, std::int64_t index) {
  if (domain() == nullptr) return;
  nvtxEventAttributes_t a{};
  a.version = NVTX_VERSION;
  a.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  a.messageType = NVTX_MESSAGE_TYPE_ASCII;
  a.message.ascii = range;
  if (index >= 0) {
    a.payloadType = NVTX_PAYLOAD_TYPE_INT64;
    a.payload.llValue = index;
  }
  nvtxDomainRangePushEx(domain(), &a);
}
void Backend::leave() {
  if (domain() != nullptr) nvtxDomainRangePop(domain());
}
#else
bool trace::attached() { return false; }
void Backend::enter(const char* /*range*/, std::int64_t /*index*/) {}
void Backend::leave() {}
#endif

std::unique_ptr<TimeMarks> Backend::time_marks() { return std::make_unique<HostMarks>(); }

}  // namespace mixlora
