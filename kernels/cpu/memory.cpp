// Memory of the CPU backend: aligned zeroed blocks, counted.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

namespace mixlora {

class CpuMemory final : public Memory {
 public:
  CpuMemory(CpuBackend& owner, std::size_t bytes) : owner_(owner), bytes_(bytes) {
    constexpr std::size_t kHuge = std::size_t{2} << 20;
    const std::size_t page = bytes >= kHuge ? kHuge : 4096;
    if (bytes > std::size_t{1} << 46) throw std::bad_alloc();
    data_ = std::aligned_alloc(page, (bytes + page) / page * page);
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (bytes >= kHuge) madvise(data_, bytes, MADV_HUGEPAGE);  // fewer page walks; may fail
#endif
    touch();
    owner_.allocated_ += bytes_;
    owner_.peak_ = owner_.allocated_ > owner_.peak_ ? owner_.allocated_ : owner_.peak_;
  }
  ~CpuMemory() override {
    owner_.allocated_ -= bytes_;
    std::free(data_);
  }
  CpuMemory(const CpuMemory&) = delete;
  CpuMemory& operator=(const CpuMemory&) = delete;
  void* data() override { return data_; }

 private:
  /// Zeros everything on all threads: the first touch of a page is the kernel's (and a virtual
  /// machine's host's) work, and one thread alone gets them at about 1 GB/s.
  void touch() {
    constexpr std::size_t kPiece = std::size_t{4} << 20;
    cpu::parallel_for(
        static_cast<std::int64_t>((bytes_ + kPiece - 1) / kPiece), [&](std::int64_t i) {
          const std::size_t at = static_cast<std::size_t>(i) * kPiece;
          std::memset(static_cast<std::byte*>(data_) + at, 0, std::min(kPiece, bytes_ - at));
        });
  }

  CpuBackend& owner_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

std::unique_ptr<Backend> make_cpu_backend(Precision precision, int threads) {
  return std::make_unique<CpuBackend>(precision, threads);
}

std::unique_ptr<Memory> CpuBackend::allocate(std::size_t bytes) {
  return std::make_unique<CpuMemory>(*this, bytes);
}

void CpuBackend::upload(Tensor dst, const void* src) {
  if (!dst.contiguous()) throw std::logic_error("upload: a strided view");
  std::memcpy(dst.data, src, dst.bytes());
}
void CpuBackend::download(void* dst, ConstTensor src) {
  if (!src.contiguous()) throw std::logic_error("download: a strided view");
  std::memcpy(dst, src.data, src.bytes());
}
void CpuBackend::zero(Tensor x) {
  const std::size_t row = static_cast<std::size_t>(x.cols()) * size_of(x.dtype);
  auto* base = static_cast<std::byte*>(x.data);
  const auto step = static_cast<std::size_t>(x.stride) * size_of(x.dtype);
  if (x.contiguous())
    std::memset(base, 0, x.bytes());
  else
    cpu::parallel_for(x.rows(), [&](std::int64_t i) {
      std::memset(base + static_cast<std::size_t>(i) * step, 0, row);
    });
}
void CpuBackend::copy(Tensor dst, ConstTensor src) {
  if (dst.rows() != src.rows() || dst.cols() != src.cols())
    throw std::logic_error("copy: shapes differ");
  cpu::parallel_for(dst.rows(), [&](std::int64_t i) {
    const std::int64_t n = dst.cols();
    if (dst.dtype == src.dtype) {
      const auto* from = static_cast<const std::byte*>(src.data) +
                         static_cast<std::size_t>(i * src.stride) * size_of(src.dtype);
      auto* to = static_cast<std::byte*>(dst.data) +
                 static_cast<std::size_t>(i * dst.stride) * size_of(dst.dtype);
      std::memcpy(to, from, static_cast<std::size_t>(n) * size_of(dst.dtype));
    } else if (dst.dtype == DType::f32) {
      for (std::int64_t j = 0; j < n; ++j)
        dst.row<float>(i)[j] = static_cast<float>(src.row<Bf16>(i)[j]);
    } else {
      for (std::int64_t j = 0; j < n; ++j) dst.row<Bf16>(i)[j] = Bf16(src.row<float>(i)[j]);
    }
  });
}

}  // namespace mixlora
