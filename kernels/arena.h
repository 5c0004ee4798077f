// Arena: declare every tensor, then take one block of memory for all of them.
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/tensor.h"

namespace mixlora {

class Backend;

/// Owns bytes on a device; freed by the destructor.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* data() = 0;
};

/// Plan first, allocate once: `declare` every tensor, then `commit` to one block of zeros.
/// Views given to `declare` have shape and type but no data until `commit`, and must stay where
/// they are until then. An arena that is never committed answers "how much would it take?".
class Arena {
 public:
  explicit Arena(std::string name) : name_(std::move(name)) {}

  /// Sets the view's shape and type and books its bytes (rounded up to 256).
  void declare(std::string_view tensor, Tensor& view, Shape shape, DType dtype);
  /// Takes the memory from `ops` and gives every declared view its data.
  void commit(Backend& ops);

  const std::string& name() const { return name_; }
  std::size_t bytes() const { return size_; }
  bool committed() const { return block_ != nullptr; }
  /// The whole block as a flat view of `dtype` elements (padding included).
  Tensor flat(DType dtype) const;

  struct Entry {
    std::string name;
    Tensor* view;
    std::size_t offset;
  };
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::string name_;
  Device device_ = Device::cpu;
  std::size_t size_ = 0;
  std::vector<Entry> entries_;
  std::unique_ptr<Memory> block_;
};

/// Last-in first-out working memory with a high-water mark. Without a block (before `commit`) it
/// hands out views without data and only measures: the same code plans and runs.
class Scratch {
 public:
  /// Everything taken while a frame lives is given back when it ends.
  class Frame {
   public:
    explicit Frame(Scratch& s) : scratch_(s), mark_(s.used_) {}
    ~Frame() { scratch_.used_ = mark_; }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

   private:
    Scratch& scratch_;
    std::size_t mark_;
  };

  Tensor take(Shape shape, DType dtype);
  void commit(Backend& ops, std::size_t bytes);
  std::size_t high_water() const { return high_; }
  std::size_t capacity() const { return capacity_; }

 private:
  std::size_t used_ = 0, high_ = 0, capacity_ = 0;
  Device device_ = Device::cpu;
  std::byte* base_ = nullptr;
  std::unique_ptr<Memory> block_;
};

}  // namespace mixlora
