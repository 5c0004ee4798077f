#include "engine/adapter.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "engine/error.h"

namespace mixlora {
namespace {

struct Sizes {
  std::int64_t in, out;
};
Sizes sizes_of(const ModelConfig& c, Projection p) {
  const std::int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  switch (p) {
    case Projection::q:
      return {c.hidden, q};
    case Projection::k:
    case Projection::v:
      return {c.hidden, kv};
    case Projection::o:
      return {q, c.hidden};
    case Projection::gate:
    case Projection::up:
      return {c.hidden, c.ffn};
    case Projection::down:
      return {c.ffn, c.hidden};
  }
  throw std::logic_error("adapter: no such projection");
}
bool in_ffn(Projection p) {
  return p == Projection::gate || p == Projection::up || p == Projection::down;
}

Shape shape_of(const ModelConfig& c, const AdapterSpec& s, ParameterKind kind, Projection p) {
  const std::int64_t experts = has_router(s) ? s.num_experts : 1;
  if (kind == ParameterKind::router) return has_router(s) ? Shape{experts, c.hidden} : Shape{};
  if (s.method == Method::base || !s.target_modules.at(static_cast<std::size_t>(p))) return {};
  const auto [in, out] = sizes_of(c, p);
  if (!in_ffn(p)) {
    if (kind == ParameterKind::a) return {s.r, in};
    if (kind == ParameterKind::b) return {out, s.r};
    return attention_dora(s) ? Shape{out} : Shape{};
  }
  const std::int64_t r = expert_rank(s);
  if (kind == ParameterKind::magnitude) return ffn_dora(s) ? Shape{experts, out} : Shape{};
  if (p == Projection::down)
    return kind == ParameterKind::a ? Shape{experts, r, in} : Shape{out, experts * r};
  return kind == ParameterKind::a ? Shape{experts * r, in} : Shape{experts, out, r};
}

/// Element i of a stream of uniform numbers on (0, 1).
double uniform(RandomKey key, std::uint32_t layer, std::uint32_t tensor, std::int64_t i) {
  const auto block = static_cast<std::uint64_t>(i) / 4;
  const Philox4 b = philox(static_cast<std::uint32_t>(block),
                           static_cast<std::uint32_t>(block >> 32), tensor, layer, key.k0, key.k1);
  return unit_open(b.v[i % 4]);
}
double normal(RandomKey key, std::uint32_t layer, std::uint32_t tensor,
              std::int64_t i) {  // Box-Muller
  const double u = uniform(key, layer, tensor, 2 * i), v = uniform(key, layer, tensor, 2 * i + 1);
  return std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v);
}

}  // namespace

AdapterLayout::AdapterLayout(const ModelConfig& model, const AdapterSpec& spec) {
  layers.resize(static_cast<std::size_t>(model.layers));
  const auto place = [&](bool fast) {
    for (auto& layer : layers) {
      parameters(layer, [&](ParameterKind kind, Projection p, Parameter& parameter) {
        const bool is_fast = kind == ParameterKind::b || kind == ParameterKind::magnitude;
        if (is_fast != fast) return;
        parameter.shape = shape_of(model, spec, kind, p);
        if (!parameter.present()) return;
        parameter.offset = elements;
        elements += (parameter.shape.numel() + 63) / 64 * 64;
        trainable += parameter.shape.numel();
      });
    }
  };
  place(false);
  fast_begin = elements;
  place(true);
}

void AdapterLayout::bind(void* value, void* grad, void* compute, DType compute_type, Device device,
                         bool shared_grad) {
  const auto at = [&](void* base, DType type, const Parameter& p, std::int64_t offset) {
    if (base == nullptr) return Tensor();
    auto* bytes = static_cast<std::byte*>(base) + static_cast<std::size_t>(offset) * size_of(type);
    return Tensor(bytes, p.shape, type, device);
  };
  for (std::int64_t i = 0; i < layer_count(); ++i) {
    parameters(layers[static_cast<std::size_t>(i)], [&](ParameterKind, Projection, Parameter& p) {
      if (!p.present()) return;
      // Within one layer's numbers: first what is before fast_begin, then the rest.
      const std::int64_t in_layer = p.offset < fast_begin
                                        ? p.offset - i * slow_stride()
                                        : slow_stride() + p.offset - fast_begin - i * fast_stride();
      p.value = at(value, DType::f32, p, p.offset);
      p.grad = at(grad, DType::f32, p, shared_grad ? in_layer : p.offset);
      p.compute = compute == nullptr ? p.value : at(compute, compute_type, p, p.offset);
    });
  }
}

Adapter::Adapter(const ModelConfig& model, const AdapterSpec& spec)
    : spec_(spec),
      model_(model),
      layout_(model, spec),
      numbers_(static_cast<std::size_t>(layout_.elements)) {
  layout_.bind(numbers_.data(), nullptr, nullptr, DType::f32, Device::cpu);
}

void Adapter::initialise(std::uint64_t seed) {
  const RandomKey key = random_key(seed, Purpose::init);
  for (std::size_t i = 0; i < layout_.layers.size(); ++i) {
    std::uint32_t tensor = 0;
    parameters(layout_.layers[i], [&](ParameterKind kind, Projection p, Parameter& parameter) {
      ++tensor;
      if (!parameter.present()) return;
      auto* x = parameter.value.ptr<float>();
      const auto layer = static_cast<std::uint32_t>(i);
      const double bound = 1 / std::sqrt(static_cast<double>(sizes_of(model_, p).in));
      const double rank = static_cast<double>(in_ffn(p) ? expert_rank(spec_) : spec_.r);
      for (std::int64_t j = 0; j < parameter.shape.numel(); ++j) {
        double v = 0;
        if (kind == ParameterKind::router)
          v = normal(key, layer, tensor, j) * router_init_range(spec_);
        else if (kind == ParameterKind::a)
          v = spec_.lora_init == LoraInit::gaussian
                  ? normal(key, layer, tensor, j) / rank
                  : (2 * uniform(key, layer, tensor, j) - 1) * bound;
        x[j] = static_cast<float>(v);
      }
    });
  }
}

void Adapter::set_magnitudes(std::size_t layer, const std::vector<float>& qkv,
                             const std::vector<float>& o, const std::vector<float>& gate_up,
                             const std::vector<float>& down) {
  const std::int64_t q = model_.heads * model_.head_dim, kv = model_.kv_heads * model_.head_dim;
  parameters(layout_.layers.at(layer), [&](ParameterKind kind, Projection p, Parameter& parameter) {
    if (kind != ParameterKind::magnitude || !parameter.present()) return;
    const float* squared = nullptr;
    switch (p) {
      case Projection::q:
        squared = qkv.data();
        break;
      case Projection::k:
        squared = qkv.data() + q;
        break;
      case Projection::v:
        squared = qkv.data() + q + kv;
        break;
      case Projection::o:
        squared = o.data();
        break;
      case Projection::gate:
        squared = gate_up.data();
        break;
      case Projection::up:
        squared = gate_up.data() + model_.ffn;
        break;
      case Projection::down:
        squared = down.data();
        break;
    }
    const std::int64_t out = parameter.shape.last();
    for (std::int64_t i = 0; i < parameter.shape.numel(); ++i)
      parameter.value.ptr<float>()[i] = std::sqrt(squared[i % out]);
  });
}

std::vector<Adapter::FileTensor> Adapter::file_tensors() const {
  std::vector<FileTensor> files;
  const bool mixture = has_router(spec_);
  for (std::size_t i = 0; i < layout_.layers.size(); ++i) {
    const std::string number = std::to_string(i);
    parameters(
        layout_.layers[i], [&](ParameterKind kind, Projection p, const Parameter& parameter) {
          if (!parameter.present()) return;
          const std::string block = in_ffn(p) ? "mlp" : "self_attn";
          const std::string layer =
              (mixture ? "mixlora.layers." : "base_model.model.model.layers.") + number + ".";
          if (kind == ParameterKind::router) {
            files.push_back({layer + "mlp.moe_gate.weight",
                             {parameter.shape[0], parameter.shape[1]},
                             parameter.value});
            return;
          }
          const std::string leaf = kind == ParameterKind::a   ? "lora_A.weight"
                                   : kind == ParameterKind::b ? "lora_B.weight"
                                                              : "lora_magnitude_vector";
          const std::string module = layer + block + "." + name_of(p) + ".";
          const std::int64_t experts = in_ffn(p) && mixture ? spec_.num_experts : 1;
          const std::int64_t r = in_ffn(p) ? expert_rank(spec_) : spec_.r;
          for (std::int64_t e = 0; e < experts; ++e) {
            const std::string name = experts > 1 || (mixture && in_ffn(p))
                                         ? module + "experts." + std::to_string(e) + "." + leaf
                                         : module + leaf;
            Tensor view = parameter.value;
            if (in_ffn(p)) {
              if (kind == ParameterKind::magnitude)
                view = view.row_range(e, e + 1).reshaped({view.cols()});
              else if (kind == ParameterKind::a && p != Projection::down)
                view = view.row_range(e * r, e * r + r);
              else if (kind == ParameterKind::b && p == Projection::down)
                view = view.col_range(e * r, e * r + r);
              else
                view = view.at(e);
            }
            std::vector<std::int64_t> shape{view.rows(), view.cols()};
            if (kind == ParameterKind::magnitude) shape = {view.cols()};
            files.push_back({name, std::move(shape), view});
          }
        });
  }
  return files;
}

}  // namespace mixlora
