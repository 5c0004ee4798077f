// The device, its memory, and the way to and from the host.
#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/products.h"

namespace mixlora {
namespace {

using cuda::check;
constexpr std::size_t kRoomBytes = std::size_t{160} << 20;
constexpr std::size_t kCounterBytes = 256;
constexpr std::size_t kStagingBytes = std::size_t{8} << 20;
constexpr int kOldest = 80;  // bf16 in the tensor cores

std::string reason_against(int device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    cudaGetLastError();
    return std::string("no CUDA device answers (") +
           (status != cudaSuccess ? cudaGetErrorString(status) : "none is visible") +
           "); is a driver loaded, and CUDA_VISIBLE_DEVICES right?";
  }
  if (device >= count)
    return "there is no CUDA device " + std::to_string(device) + ": " + std::to_string(count) +
           " visible, counted from 0";
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "attributes");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "attributes");
  if (10 * major + minor < kOldest)
    return "compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           " is too old: 8.0 or newer is needed";
  return {};
}

/// dst = src between any two of f32 and bf16, strided.
template <class To, class From>
__global__ void copy_kernel(To* to, cuda::Index to_stride, const From* from,
                            cuda::Index from_stride, cuda::Index rows, cuda::Index cols) {
  const cuda::Index step = static_cast<cuda::Index>(gridDim.x) * blockDim.x;
  for (cuda::Index i = static_cast<cuda::Index>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < rows * cols; i += step) {
    const cuda::Index r = i / cols, c = i % cols;
    to[r * to_stride + c] = cuda::from_float<To>(cuda::to_float(from[r * from_stride + c]));
  }
}

}  // namespace

class CudaMemory final : public Memory {
 public:
  CudaMemory(CudaBackend& owner, std::size_t bytes) : owner_(owner), bytes_(bytes) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
    try {
      check(cudaMemsetAsync(data_, 0, bytes, owner.stream_), "cudaMemset");
    } catch (...) {
      cudaFree(data_);
      throw;
    }
    owner_.allocated_ += bytes_;
    owner_.peak_ = std::max(owner_.peak_, owner_.allocated_);
  }
  ~CudaMemory() override {
    owner_.allocated_ -= bytes_;
    cudaFree(data_);  // waits for the device
  }
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;
  void* data() override { return data_; }

 private:
  CudaBackend& owner_;
  std::size_t bytes_;
  void* data_ = nullptr;
};

std::string cuda_unavailable_reason() { return reason_against(0); }

std::unique_ptr<Backend> make_cuda_backend(Precision precision, int device) {
  if (const std::string reason = reason_against(device); !reason.empty())
    throw std::runtime_error("CUDA: " + reason);
  return std::make_unique<CudaBackend>(precision, device);
}

CudaBackend::CudaBackend(Precision precision, int device)
    : device_(device), type_(precision == Precision::fp32 ? DType::f32 : DType::bf16) {
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device), "attributes");
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream");
  workspace_ = allocate(workspace_bytes());
  for (Staging& s : staging_) {
    check(cudaMallocHost(&s.data, kStagingBytes), "pinned host memory");
    check(cudaEventCreateWithFlags(&s.sent, cudaEventDisableTiming), "an event");
  }
  products_ =
      std::make_unique<Products>(static_cast<std::byte*>(workspace_->data()) + kRoomBytes, stream_);
}

CudaBackend::~CudaBackend() {
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  products_.reset();
  workspace_.reset();
  for (const Staging& s : staging_) {
    if (s.sent != nullptr) cudaEventDestroy(s.sent);
    if (s.data != nullptr) cudaFreeHost(s.data);
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

std::string CudaBackend::description() const {
  cudaDeviceProp p{};
  check(cudaGetDeviceProperties(&p, device_), "properties");
  const std::size_t version = cublasLtGetVersion();
  return std::string(p.name) + ", " + std::to_string(p.multiProcessorCount) + " SMs, sm_" +
         std::to_string(p.major) + std::to_string(p.minor) + ", " +
         std::to_string(p.totalGlobalMem >> 20) + " MiB, " + name_of(type_) + ", cuBLASLt " +
         std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100);
}

std::unique_ptr<Memory> CudaBackend::allocate(std::size_t bytes) {
  return std::make_unique<CudaMemory>(*this, bytes);
}
std::size_t CudaBackend::device_bytes() const {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "the device's memory");
  return total - free;
}
std::size_t CudaBackend::workspace_bytes() const {
  return kRoomBytes + Products::kWorkspaceBytes + kCounterBytes;
}

CudaBackend::Room CudaBackend::room() const {
  return {static_cast<std::byte*>(workspace_->data()), kRoomBytes};
}
unsigned* CudaBackend::arrived() const {
  return static_cast<unsigned*>(workspace_->data()) +
         (kRoomBytes + Products::kWorkspaceBytes) / sizeof(unsigned);
}
void* CudaBackend::Room::take_bytes(std::size_t bytes) {
  std::byte* at = at_;
  const std::size_t whole = (bytes + 255) / 256 * 256;
  if (whole > static_cast<std::size_t>(end_ - at_))
    throw std::logic_error("cuda: a call needs more working memory than the backend has");
  at_ += whole;
  return at;
}

void CudaBackend::upload(Tensor dst, const void* src) {
  if (!dst.contiguous()) throw std::logic_error("upload: a strided view");
  const std::size_t bytes = dst.bytes();
  for (std::size_t at = 0; at < bytes; at += kStagingBytes) {
    const std::size_t size = std::min(kStagingBytes, bytes - at);
    Staging& s = staging_[next_staging_];
    next_staging_ = 1 - next_staging_;
    check(cudaEventSynchronize(s.sent), "the last upload");
    std::memcpy(s.data, static_cast<const std::byte*>(src) + at, size);
    check(cudaMemcpyAsync(static_cast<std::byte*>(dst.data) + at, s.data, size,
                          cudaMemcpyHostToDevice, stream_),
          "upload");
    check(cudaEventRecord(s.sent, stream_), "upload");
  }
}
void CudaBackend::download(void* dst, ConstTensor src) {
  if (!src.contiguous()) throw std::logic_error("download: a strided view");
  check(cudaMemcpyAsync(dst, src.data, src.bytes(), cudaMemcpyDeviceToHost, stream_), "download");
  check(cudaStreamSynchronize(stream_), "download");
}
void CudaBackend::synchronize() { check(cudaStreamSynchronize(stream_), "the device's work"); }

void CudaBackend::zero(Tensor x) {
  if (x.numel() == 0) return;
  const std::size_t row = static_cast<std::size_t>(x.cols()) * size_of(x.dtype);
  if (x.contiguous())
    check(cudaMemsetAsync(x.data, 0, x.bytes(), stream_), "zero");
  else
    check(cudaMemset2DAsync(x.data, static_cast<std::size_t>(x.stride) * size_of(x.dtype), 0, row,
                            static_cast<std::size_t>(x.rows()), stream_),
          "zero");
}

void CudaBackend::copy(Tensor dst, ConstTensor src) {
  if (dst.rows() != src.rows() || dst.cols() != src.cols())
    throw std::logic_error("copy: shapes differ");
  if (dst.numel() == 0) return;
  if (dst.dtype == src.dtype) {
    const std::size_t size = size_of(dst.dtype);
    check(
        cudaMemcpy2DAsync(dst.data, static_cast<std::size_t>(dst.stride) * size, src.data,
                          static_cast<std::size_t>(src.stride) * size,
                          static_cast<std::size_t>(dst.cols()) * size,
                          static_cast<std::size_t>(dst.rows()), cudaMemcpyDeviceToDevice, stream_),
        "copy");
    return;
  }
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>(
      cuda::ceil_div<std::int64_t>(dst.numel(), kThreads), processors_ * 16));
  cuda::with_type(dst.dtype, [&](auto to) {
    cuda::with_type(src.dtype, [&](auto from) {
      using To = decltype(to);
      using From = decltype(from);
      copy_kernel<<<blocks, kThreads, 0, stream_>>>(cuda::data<To>(dst), dst.stride,
                                                    cuda::data<From>(src), src.stride, dst.rows(),
                                                    dst.cols());
    });
  });
  cuda::launched("copy");
}

}  // namespace mixlora
