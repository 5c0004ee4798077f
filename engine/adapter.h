// Adapter: every trainable number of one LoRA, DoRA, MixLoRA or MixDoRA adapter, as a table of
// experts.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "engine/specs.h"
#include "kernels/tensor.h"

namespace mixlora {

/// One trainable tensor: the f32 master, its gradient, and the copy products read. Absent when its
/// projection is not targeted. `offset` counts elements in the adapter's flat ranges.
struct Parameter {
  Tensor value, grad, compute;
  Shape shape;
  std::int64_t offset = 0;
  bool present() const { return shape.rank > 0; }
};

/// One block's share. LoRA and DoRA are the case E = 1 without a router.
struct AdapterLayer {
  std::array<Parameter, 3> qkv_a, qkv_b, qkv_m;  // q, k, v: A (R, D), B (out, R), magnitude (out)
  Parameter o_a, o_b, o_m;                       // A (R, H head_dim), B (D, R), m (D)
  Parameter gate_a, up_a;                        // (E R, D): expert e owns rows [e R, e R + R)
  Parameter gate_b, up_b;                        // (E, F, R)
  Parameter down_a;                              // (E, R, F)
  Parameter down_b;                              // (D, E R): expert e owns columns [e R, e R + R)
  Parameter gate_m, up_m, down_m;                // (E, F), (E, F), (E, D)
  Parameter router;                              // (E, D)
};

enum class ParameterKind : std::uint8_t { a, b, magnitude, router };

/// The listing, once: calls v(kind, projection, parameter) for every parameter of a layer in a
/// fixed order.
template <class Layer, class V> void parameters(Layer& l, V&& v) {
  constexpr std::array kQkv{Projection::q, Projection::k, Projection::v};
  for (std::size_t i = 0; i < 3; ++i) v(ParameterKind::a, kQkv.at(i), l.qkv_a.at(i));
  v(ParameterKind::a, Projection::o, l.o_a);
  v(ParameterKind::a, Projection::gate, l.gate_a);
  v(ParameterKind::a, Projection::up, l.up_a);
  v(ParameterKind::a, Projection::down, l.down_a);
  v(ParameterKind::router, Projection::gate, l.router);
  for (std::size_t i = 0; i < 3; ++i) v(ParameterKind::b, kQkv.at(i), l.qkv_b.at(i));
  v(ParameterKind::b, Projection::o, l.o_b);
  v(ParameterKind::b, Projection::gate, l.gate_b);
  v(ParameterKind::b, Projection::up, l.up_b);
  v(ParameterKind::b, Projection::down, l.down_b);
  for (std::size_t i = 0; i < 3; ++i) v(ParameterKind::magnitude, kQkv.at(i), l.qkv_m.at(i));
  v(ParameterKind::magnitude, Projection::o, l.o_m);
  v(ParameterKind::magnitude, Projection::gate, l.gate_m);
  v(ParameterKind::magnitude, Projection::up, l.up_m);
  v(ParameterKind::magnitude, Projection::down, l.down_m);
}

/// Shapes and flat offsets of all parameters. First the A factors and routers of all layers, then
/// from `fast_begin` the B factors and magnitudes, which LoRA+ gives another learning rate.
struct AdapterLayout {
  std::vector<AdapterLayer> layers;
  std::int64_t fast_begin = 0, elements = 0;  // elements: padded to 64 a tensor
  std::int64_t trainable = 0;                 // true number of parameters

  AdapterLayout(const ModelConfig& model, const AdapterSpec& spec);
  std::int64_t layer_count() const { return static_cast<std::int64_t>(layers.size()); }
  /// Points every present parameter into flat blocks; any may be null. `shared_grad`: the block of
  /// gradients has the numbers of one layer, and all layers take turns in it.
  void bind(void* value, void* grad, void* compute, DType compute_type, Device device,
            bool shared_grad = false);
  /// Numbers of one layer before `fast_begin` and from it on: layers are alike, end to end in both.
  std::int64_t slow_stride() const { return fast_begin / layer_count(); }
  std::int64_t fast_stride() const { return (elements - fast_begin) / layer_count(); }
};

/// A whole adapter on the host.
class Adapter {
 public:
  Adapter(const ModelConfig& model, const AdapterSpec& spec);
  Adapter(const Adapter&) = delete;
  Adapter& operator=(const Adapter&) = delete;

  const AdapterSpec& spec() const { return spec_; }
  AdapterLayout& layout() { return layout_; }
  const AdapterLayout& layout() const { return layout_; }
  /// All parameters, flat. A span: the layout's views point into this very memory.
  std::span<float> numbers() { return numbers_; }
  std::span<const float> numbers() const { return numbers_; }
  std::int64_t trainable() const { return layout_.trainable; }

  /// A ~ U(-1/sqrt(in), 1/sqrt(in)) or N(0, 1/r), B = 0, router ~ N(0, router_init_range), all from
  /// Philox of `seed`. Magnitudes are set by `set_magnitudes`.
  void initialise(std::uint64_t seed);
  /// m = row norms of W: squared norms of layer i's q|k|v, o, gate|up, down rows.
  void set_magnitudes(std::size_t layer, const std::vector<float>& qkv, const std::vector<float>& o,
                      const std::vector<float>& gate_up, const std::vector<float>& down);

  /// One tensor of the adapter file: name as in methods.md section 6, shape, strided view of the
  /// numbers.
  struct FileTensor {
    std::string name;
    std::vector<std::int64_t> shape;
    Tensor view;
  };
  std::vector<FileTensor> file_tensors() const;
  /// adapter_config.json and adapter_model.safetensors, PEFT's names for LoRA and DoRA, MoE-PEFT's
  /// for the others.
  void save(const std::filesystem::path& directory, const std::string& base_model) const;
  /// Reads what `save` writes, and PEFT's LoRA and DoRA files. Throws InputError naming a missing
  /// tensor.
  void load(const std::filesystem::path& directory);

 private:
  AdapterSpec spec_;
  ModelConfig model_;
  AdapterLayout layout_;
  std::vector<float> numbers_;
};

}  // namespace mixlora
