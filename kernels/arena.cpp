#include "kernels/arena.h"

#include "kernels/backend.h"

namespace mixlora {
namespace {
constexpr std::size_t kAlignment = 256;  // cuBLASLt's widest vector needs 16, TMA 128
std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}
}  // namespace

void Arena::declare(std::string_view tensor, Tensor& view, Shape shape, DType dtype) {
  if (committed()) throw std::logic_error("arena " + name_ + ": declared after commit");
  view = Tensor(nullptr, shape, dtype, device_);
  entries_.push_back({std::string(tensor), &view, size_});
  size_ += aligned(view.bytes());
}

void Arena::commit(Backend& ops) {
  device_ = ops.device();
  block_ = ops.allocate(size_);
  auto* base = static_cast<std::byte*>(block_->data());
  for (auto& e : entries_) {
    e.view->device = device_;
    e.view->data = e.view->numel() == 0 ? nullptr : base + e.offset;
  }
}

Tensor Arena::flat(DType dtype) const {
  const auto n = static_cast<std::int64_t>(size_ / size_of(dtype));
  return {block_ ? block_->data() : nullptr, {n}, dtype, device_};
}

Tensor Scratch::take(Shape shape, DType dtype) {
  Tensor t(nullptr, shape, dtype, device_);
  if (base_ != nullptr) {
    if (used_ + t.bytes() > capacity_) throw std::logic_error("scratch: more taken than planned");
    t.data = base_ + used_;
  }
  used_ += aligned(t.bytes());
  high_ = used_ > high_ ? used_ : high_;
  return t;
}

void Scratch::commit(Backend& ops, std::size_t bytes) {
  block_.reset();
  device_ = ops.device();
  capacity_ = aligned(bytes);
  block_ = ops.allocate(capacity_);
  base_ = static_cast<std::byte*>(block_->data());
}

}  // namespace mixlora
