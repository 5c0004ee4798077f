// Transformer: forward and backward of the adapted model over one step's rows.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/device_adapter.h"
#include "engine/model.h"
#include "engine/specs.h"
#include "kernels/arena.h"
#include "kernels/backend.h"

namespace mixlora {

/// Rows [begin, end) of a step belong to one adapter; its sequences count rows from `begin`.
struct Group {
  std::int64_t begin = 0, end = 0;
  DeviceAdapter* adapter = nullptr;  // null: the base model alone
  Sequences sequences;
  float aux_factor = 1;  // share of the optimizer step's tokens that this group's rows are
  std::int64_t selected_begin = 0, selected_end = 0;  // its part of Step::selected
  std::int64_t rows() const { return end - begin; }
};

/// One pass over the model: tokens of all sequences of all groups, end to end.
struct Step {
  std::int64_t rows = 0;
  Tensor tokens;  // (N) i32
  Tensor ids;     // (N, 4) i32: sample, position, step, adapter
  Sequences sequences;
  std::vector<Group> groups;  // in row order, covering all rows
  /// The rows whose hidden state is wanted, (S) i32, counted from their group's first, no row
  /// twice; absent: all. Nothing else reads what the last block makes of a row behind its
  /// attention, so the rest runs on these alone: in scoring from there on, in training behind the
  /// router, whose losses are of all rows, as are places at experts of limited capacity.
  Tensor selected;
  Tensor selected_ids;    // (S, 4) i32: their ids
  bool training = false;  // dropout and jitter on, things kept for backward
};

/// What one group keeps of one layer for backward; absent parts are not used by its method.
struct GroupKept {
  Tensor a_qkv;                  // (n, sum of ranks): s A x~ of the targeted ones of q, k, v
  Tensor a_o;                    // (n, R)
  Tensor core_o;                 // (n, D) before DoRA's scale
  Tensor a_ffn;                  // (n, 2 E R)
  Tensor z;                      // (n, K R)
  Tensor logits, probabilities;  // (n, E) f32
  Slots routed;                  // of all rows
  Slots slots;                   // of those that the experts take
  Tensor core_down;              // (K, n, D) before DoRA's scale
};
struct LayerKept {
  Tensor x, r1;    // (N, D) input of the layer; (N) f32 its 1/rms
  Tensor qkv;      // (N, (H + 2 Hkv) head_dim), scaled and roped
  Tensor o, lse;   // (N, H head_dim); (N, H) f32
  Tensor x2, r2;   // (N, D) after attention; (N) f32
  Tensor gate_up;  // (N, 2F)
  // In the last layer, where the step has selected rows: of these alone, from `gate_up` on and what
  // groups keep behind their routers, or from `x2` on and all that groups keep behind attention.
  std::vector<GroupKept> groups;
};

class Transformer {
 public:
  /// `kept` holds what backward needs, `scratch` the rest; both are reset by each call of
  /// `forward`'s owner frame.
  Transformer(Backend& ops, const Model& model, Scratch& kept, Scratch& scratch,
              Recompute recompute)
      : ops_(ops), model_(model), kept_(kept), scratch_(scratch), recompute_(recompute) {}

  /// Final normalised hidden rows (N, D), or the selected ones (S, D), in scratch memory of the
  /// caller's frame.
  Tensor forward(const Step& step);
  /// From the gradient of forward's result; adds into the adapters' gradients.
  void backward(const Step& step, ConstTensor d_hidden);

 private:
  void layer_forward(const Step& step, std::size_t i, LayerKept& k, Tensor normed, Tensor delta,
                     bool again);
  void attention_forward(const Step& step, std::size_t i, LayerKept& k, ConstTensor normed,
                         Tensor delta);
  void attention_backward(const Step& step, std::size_t i, LayerKept& k, Tensor d_x);
  void feed_forward(const Step& step, std::size_t i, LayerKept& k, Tensor normed, Tensor delta,
                    bool again);
  void route_group(const Step& step, std::size_t i, const Group& g, GroupKept& gk, Tensor normed);
  void group_feed_forward(const Step& step, std::size_t i, std::size_t j, GroupKept& gk,
                          ConstTensor normed, ConstTensor gate_up, Tensor delta, bool again);
  void feed_forward_backward(const Step& step, std::size_t i, LayerKept& k, Tensor d_x,
                             Tensor d_out);

  /// Whether layer i hands on the selected rows alone.
  bool narrows(const Step& step, std::size_t i) const {
    return step.selected && i + 1 == model_.layers.size();
  }
  /// The step that layer i's experts see, and what follows it.
  const Step& behind(const Step& step, std::size_t i) const {
    return narrows(step, i) ? selected_ : step;
  }
  /// The step that follows layer i's attention: that of its experts already, unless their router
  /// needs all rows.
  const Step& behind_attention(const Step& step, std::size_t i) const;
  /// Of a step's rows those that `taken`, one of the two above, has; gathered ones in scratch
  /// memory of the caller's frame.
  ConstTensor taken_rows(const Step& step, const Step& taken, ConstTensor all);
  /// The selected rows of all groups; back again, added.
  void gather(const Step& step, Tensor to, ConstTensor from);
  void scatter_add(const Step& step, Tensor to, ConstTensor from);

  Tensor by_expert(const GroupKept& gk, std::int64_t rows, bool per_slot);
  /// sum = x + delta and what is pending, normed = rmsnorm(sum).
  void add_and_norm(const Step& step, Tensor sum, Tensor normed, Tensor r, ConstTensor x,
                    Tensor delta, ConstTensor w);

  Mixture mixture_of(const Step& step, std::size_t i, const Group& g, const GroupKept& gk,
                     ConstTensor gate_up) const;
  Dropout dropout_of(const Group& g, std::size_t layer, std::uint32_t site, float p) const;
  float rate(const Step& step, float p) const { return step.training ? p : 0; }
  RowIds ids(const Step& step, const Group& g) const { return step.ids.row_range(g.begin, g.end); }
  /// a = s dropout(x) A^T of a group's rows.
  void through_a(const Step& step, const Group& g, std::size_t layer, std::uint32_t site, float p,
                 Tensor a, ConstTensor x, ConstTensor weight, float s);
  /// The same, and the logits of a router that reads the same x.
  void through_a_and_router(const Step& step, const Group& g, std::size_t layer, std::uint32_t site,
                            float p, Tensor a, Tensor logits, ConstTensor x, ConstTensor weight,
                            ConstTensor router, float s);
  /// The gradients of A and, when d_x is there, of x, added.
  void through_a_backward(const Step& step, const Group& g, std::size_t layer, std::uint32_t site,
                          float p, Tensor d_weight, Tensor d_x, ConstTensor d_a, ConstTensor x,
                          ConstTensor weight);
  /// The same, and those of a router that reads the same x.
  void through_a_and_router_backward(const Step& step, const Group& g, std::size_t layer,
                                     std::uint32_t site, float p, Tensor d_weight, Tensor d_router,
                                     Tensor d_x, ConstTensor d_a, ConstTensor d_logits,
                                     ConstTensor x, ConstTensor weight, ConstTensor router);
  /// Through A where x = rmsnorm(input), and the norm's own: d_y, x's gradient so far, is
  /// overwritten, as is `room` (n, D); a and s as in through_a; row_dots may be absent.
  void through_a_and_norm_backward(const Step& step, const Group& g, std::size_t layer,
                                   std::uint32_t site, float p, Tensor d_weight, Tensor d_input,
                                   Tensor d_y, ConstTensor d_a, ConstTensor weight, ConstTensor a,
                                   float s, ConstTensor input, ConstTensor norm, ConstTensor r,
                                   ConstTensor row_dots, Tensor room);
  /// The same with a router that reads x too.
  void through_a_router_and_norm_backward(const Step& step, const Group& g, std::size_t layer,
                                          std::uint32_t site, float p, Tensor d_weight,
                                          Tensor d_router, Tensor d_input, Tensor d_y,
                                          ConstTensor d_a, ConstTensor d_logits, ConstTensor weight,
                                          ConstTensor router, ConstTensor input, ConstTensor norm,
                                          ConstTensor r, ConstTensor row_dots, ConstTensor logits,
                                          Tensor room);

  Backend& ops_;
  const Model& model_;
  Scratch& kept_;
  Scratch& scratch_;
  Recompute recompute_;
  std::vector<LayerKept> layers_;
  Step selected_;  // the step's selected rows as a step of their own
  /// What a group's delta still lacks, added where it is read; `core`: its rows, elsewhere;
  /// `slots`, where there is a choice: whose update it is.
  struct Pending {
    LowRank update;
    Tensor core;
    Slots slots;
  };
  std::vector<Pending> pending_;  // by group
};

}  // namespace mixlora
