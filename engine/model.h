// Model: the frozen base model on a device, loaded from a Hugging Face directory or made as a
// shape.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "kernels/arena.h"
#include "kernels/backend.h"

namespace mixlora {

/// One block's frozen weights. q, k, v are one matrix, gate and up another, so that each input is
/// read once.
struct LayerWeights {
  FrozenMatrix qkv;              // ((H + 2 Hkv) head_dim, D): q rows, k rows, v rows
  FrozenMatrix o;                // (D, H head_dim)
  FrozenMatrix gate_up;          // (2F, D): gate rows, up rows
  FrozenMatrix down;             // (D, F)
  Tensor input_norm, post_norm;  // (D) f32
  Tensor qkv_squared, o_squared, gate_up_squared,
      down_squared;  // |W_o|^2 by output row, f32: for DoRA
};

/// The frozen model. Not movable: the arena's views point into it.
class Model {
 public:
  /// `source`: a directory with config.json and *.safetensors, or "shape:NAME" for random weights
  /// of a known shape. Throws InputError (missing file, missing or misshapen tensor),
  /// std::bad_alloc.
  static std::unique_ptr<Model> load(Backend& ops, const std::string& source);
  /// Random weights of any shape: for measuring speed and memory, and for tests.
  static std::unique_ptr<Model> random_weights(Backend& ops, const ModelConfig& config);
  /// The views without memory: for planning.
  static std::unique_ptr<Model> plan(Backend& ops, const ModelConfig& config);
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  ModelConfig config;
  Tensor embedding;   // (V, D)
  FrozenMatrix head;  // (V, D); its rows are `embedding` when tied
  Tensor final_norm;  // (D) f32
  Tensor rope;        // (positions, head_dim) f32: cos | sin
  std::vector<LayerWeights> layers;
  bool random = false;  // a shape: no accuracy can come of it

  std::size_t bytes() const { return frozen_.bytes(); }

 private:
  Model() : frozen_("frozen") {}
  using Fill = std::function<void(Tensor rows, const std::string& tensor)>;
  void declare(Backend& ops);
  static std::unique_ptr<Model> filled(Backend& ops, const ModelConfig& config, const Fill& fill);
  Arena frozen_;
};

/// config.json of a model source: a directory, or "shape:NAME".
ModelConfig config_of(const std::string& source);

}  // namespace mixlora
