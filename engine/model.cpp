#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <span>

#include "engine/error.h"
#include "engine/safetensors.h"

namespace mixlora {
namespace {

constexpr std::string_view kShapePrefix = "shape:";

void declare_matrix(Arena& arena, Backend& ops, const std::string& name, FrozenMatrix& w,
                    std::int64_t out, std::int64_t in) {
  w.out = out;
  w.in = in;
  w.dtype = ops.matrix_type();
  arena.declare(name, w.storage, {static_cast<std::int64_t>(ops.matrix_bytes(out, in) + 3) / 4},
                DType::i32);
}

/// Host f32 numbers into a device view of f32 or bf16.
void upload_numbers(Backend& ops, Tensor dst, const std::vector<float>& numbers) {
  if (dst.dtype == DType::f32) {
    ops.upload(dst, numbers.data());
    return;
  }
  std::vector<Bf16> half(numbers.size());
  std::transform(numbers.begin(), numbers.end(), half.begin(), [](float v) { return Bf16(v); });
  ops.upload(dst, half.data());
}

using Fill = std::function<void(Tensor rows, const std::string& name)>;

/// Numbers go from the mapped file straight to the device where the types agree, else by way of a
/// small block of f32.
Fill fill_from_files(Backend& ops, const TensorFiles& files) {
  return [&ops, &files](Tensor rows, const std::string& name) {
    constexpr std::int64_t kBlock = 1 << 20;
    std::vector<std::int64_t> shape{rows.rows(), rows.cols()};
    if (rows.shape.rank == 1) shape = {rows.numel()};
    const FileTensorView& t = files.find(name, shape);
    if ((t.type == FileType::f32 && rows.dtype == DType::f32) ||
        (t.type == FileType::bf16 && rows.dtype == DType::bf16)) {
      ops.upload(rows, t.bytes.data());
      return;
    }
    const std::size_t element = t.type == FileType::f32 ? 4 : 2;
    const std::int64_t each = std::max<std::int64_t>(1, kBlock / rows.cols());
    for (std::int64_t i = 0; i < rows.rows(); i += each) {
      const Tensor block = rows.row_range(i, std::min(rows.rows(), i + each));
      std::vector<float> numbers(static_cast<std::size_t>(block.numel()));
      const auto begin = static_cast<std::size_t>(i * rows.cols()) * element;
      convert_to_f32(numbers, t.bytes.subspan(begin, numbers.size() * element), t.type);
      upload_numbers(ops, block, numbers);
    }
  };
}

/// Every weight must be there and of its shape before memory is taken for what config.json claims.
void require_weights(const TensorFiles& files, const ModelConfig& c) {
  const std::int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  files.find("model.embed_tokens.weight", {c.vocab, c.hidden});
  if (!c.tied_embeddings) files.find("lm_head.weight", {c.vocab, c.hidden});
  files.find("model.norm.weight", {c.hidden});
  for (std::int64_t i = 0; i < c.layers; ++i) {
    const std::string at = "model.layers." + std::to_string(i) + ".";
    files.find(at + "self_attn.q_proj.weight", {q, c.hidden});
    for (const char* name : {"self_attn.k_proj.weight", "self_attn.v_proj.weight"})
      files.find(at + name, {kv, c.hidden});
    files.find(at + "self_attn.o_proj.weight", {c.hidden, q});
    for (const char* name : {"mlp.gate_proj.weight", "mlp.up_proj.weight"})
      files.find(at + name, {c.ffn, c.hidden});
    files.find(at + "mlp.down_proj.weight", {c.hidden, c.ffn});
    for (const char* name : {"input_layernorm.weight", "post_attention_layernorm.weight"})
      files.find(at + name, {c.hidden});
  }
}

/// Uniform numbers of variance 1 / columns, one block repeated: a shape is for speed and memory,
/// not for meaning.
Fill fill_random(Backend& ops) {
  return [&ops](Tensor rows, const std::string& name) {
    if (rows.shape.rank == 1) {
      upload_numbers(ops, rows, std::vector<float>(static_cast<std::size_t>(rows.numel()), 1.0F));
      return;
    }
    const RandomKey key = random_key(std::hash<std::string>{}(name), Purpose::init);
    constexpr std::int64_t kBlock = std::int64_t{1} << 20;
    const Tensor flat = rows.reshaped({1, rows.numel()});
    std::vector<float> numbers(static_cast<std::size_t>(std::min(rows.numel(), kBlock)));
    const double width = 2 * std::sqrt(3.0 / static_cast<double>(rows.cols()));
    for (std::size_t i = 0; i < numbers.size(); i += 4) {
      const Philox4 bits = philox(static_cast<std::uint32_t>(i), 0, 0, 0, key.k0, key.k1);
      for (std::size_t j = i; j < std::min(numbers.size(), i + 4); ++j)
        numbers[j] = static_cast<float>((unit_open(bits.v[j - i]) - 0.5) * width);
    }
    std::vector<Bf16> half;
    if (rows.dtype == DType::bf16)
      for (const float x : numbers) half.emplace_back(x);
    const void* from = half.empty() ? static_cast<const void*>(numbers.data()) : half.data();
    for (std::int64_t at = 0; at < rows.numel(); at += kBlock)
      ops.upload(flat.col_range(at, std::min(rows.numel(), at + kBlock)), from);
  };
}

}  // namespace

ModelConfig config_of(const std::string& source) {
  if (source.starts_with(kShapePrefix)) return shape_config(source.substr(kShapePrefix.size()));
  const std::filesystem::path dir(source);
  require(
      std::filesystem::is_directory(dir),
      "model \"{}\": no such directory; expected a Hugging Face directory (config.json, "
      "*.safetensors, "
      "tokenizer.json) or \"shape:llama-2-7b\"; scripts/fetch_model.sh gets models/smollm2-135m",
      source);
  return read_model_config(dir / "config.json");
}

void Model::declare(Backend& ops) {
  const ModelConfig& c = config;
  if (!c.tied_embeddings)
    frozen_.declare("embed_tokens", embedding, {c.vocab, c.hidden}, ops.matrix_type());
  declare_matrix(frozen_, ops, "lm_head", head, c.vocab, c.hidden);
  frozen_.declare("norm", final_norm, {c.hidden}, DType::f32);
  frozen_.declare("rope", rope, {c.max_positions, c.head_dim}, DType::f32);
  layers.resize(static_cast<std::size_t>(c.layers));
  for (auto& l : layers) {
    declare_matrix(frozen_, ops, "qkv", l.qkv, c.qkv_width(), c.hidden);
    declare_matrix(frozen_, ops, "o", l.o, c.hidden, c.heads * c.head_dim);
    declare_matrix(frozen_, ops, "gate_up", l.gate_up, 2 * c.ffn, c.hidden);
    declare_matrix(frozen_, ops, "down", l.down, c.hidden, c.ffn);
    frozen_.declare("input_norm", l.input_norm, {c.hidden}, DType::f32);
    frozen_.declare("post_norm", l.post_norm, {c.hidden}, DType::f32);
    frozen_.declare("qkv_squared", l.qkv_squared, {c.qkv_width()}, DType::f32);
    frozen_.declare("o_squared", l.o_squared, {c.hidden}, DType::f32);
    frozen_.declare("gate_up_squared", l.gate_up_squared, {2 * c.ffn}, DType::f32);
    frozen_.declare("down_squared", l.down_squared, {c.hidden}, DType::f32);
  }
  frozen_.commit(ops);
}

std::unique_ptr<Model> Model::plan(Backend& ops, const ModelConfig& config) {
  std::unique_ptr<Model> m(new Model);
  m->config = config;
  m->declare(ops);
  if (config.tied_embeddings) m->embedding = ops.matrix_rows(m->head);
  return m;
}

std::unique_ptr<Model> Model::load(Backend& ops, const std::string& source) {
  const ModelConfig c = config_of(source);
  if (source.starts_with(kShapePrefix)) return random_weights(ops, c);
  const TensorFiles files = TensorFiles::open(source);
  require_weights(files, c);
  return filled(ops, c, fill_from_files(ops, files));
}

std::unique_ptr<Model> Model::random_weights(Backend& ops, const ModelConfig& config) {
  auto m = filled(ops, config, fill_random(ops));
  m->random = true;
  return m;
}

std::unique_ptr<Model> Model::filled(Backend& ops, const ModelConfig& c, const Fill& fill) {
  auto m = plan(ops, c);
  const std::int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  const Tensor head_rows = ops.matrix_rows(m->head);
  fill(head_rows, c.tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
  ops.pack_matrix(m->head);
  if (!c.tied_embeddings) fill(m->embedding, "model.embed_tokens.weight");
  fill(m->final_norm, "model.norm.weight");

  for (std::size_t i = 0; i < m->layers.size(); ++i) {
    LayerWeights& l = m->layers[i];
    const std::string at = "model.layers." + std::to_string(i) + ".";
    const Tensor qkv = ops.matrix_rows(l.qkv), gate_up = ops.matrix_rows(l.gate_up);
    fill(qkv.row_range(0, q), at + "self_attn.q_proj.weight");
    fill(qkv.row_range(q, q + kv), at + "self_attn.k_proj.weight");
    fill(qkv.row_range(q + kv, q + 2 * kv), at + "self_attn.v_proj.weight");
    fill(ops.matrix_rows(l.o), at + "self_attn.o_proj.weight");
    fill(gate_up.row_range(0, c.ffn), at + "mlp.gate_proj.weight");
    fill(gate_up.row_range(c.ffn, 2 * c.ffn), at + "mlp.up_proj.weight");
    fill(ops.matrix_rows(l.down), at + "mlp.down_proj.weight");
    fill(l.input_norm, at + "input_layernorm.weight");
    fill(l.post_norm, at + "post_attention_layernorm.weight");
    for (auto [w, squared] : {std::pair{&l.qkv, &l.qkv_squared},
                              {&l.o, &l.o_squared},
                              {&l.gate_up, &l.gate_up_squared},
                              {&l.down, &l.down_squared}}) {
      ops.pack_matrix(*w);
      ops.row_norms_squared(*squared, *w);
    }
  }

  const std::vector<double> frequency = rope_frequencies(c);
  const auto half = static_cast<std::int64_t>(frequency.size());
  std::vector<float> table(static_cast<std::size_t>(c.max_positions * 2 * half));
  for (std::int64_t p = 0; p < c.max_positions; ++p) {
    for (std::int64_t j = 0; j < half; ++j) {
      const double angle = static_cast<double>(p) * frequency[static_cast<std::size_t>(j)];
      table[static_cast<std::size_t>(p * 2 * half + j)] = static_cast<float>(std::cos(angle));
      table[static_cast<std::size_t>(p * 2 * half + half + j)] =
          static_cast<float>(std::sin(angle));
    }
  }
  ops.upload(m->rope, table.data());
  ops.synchronize();
  return m;
}

}  // namespace mixlora
