// Operations that other operations make up; a backend overrides those it has a faster way for.
#include "kernels/backend.h"

namespace mixlora {

void Backend::lora_a(Tensor a, ConstTensor x, ConstTensor weight, float s, const Dropout& d,
                     RowIds ids, Tensor room) {
  if (d.active()) {
    dropout(room, x, d, ids);
    x = room;
  }
  gemm(a, x, false, weight, true, s, 0);
}

void Backend::lora_a_backward(Tensor d_weight, Tensor d_x, ConstTensor d_a, ConstTensor x,
                              ConstTensor weight, const Dropout& d, RowIds ids, Tensor room) {
  if (!d.active()) {
    gemm(d_weight, d_a, true, x, false, 1, 1);
    if (d_x) gemm(d_x, d_a, false, weight, false, 1, 1);
    return;
  }
  dropout(room, x, d, ids);
  gemm(d_weight, d_a, true, room, false, 1, 1);
  if (!d_x) return;
  gemm(room, d_a, false, weight, false, 1, 0);
  dropout_backward_add(d_x, room, d, ids);
}

void Backend::lora_b_backward(std::span<const LowRankBackward> all, float s) {
  for (const LowRankBackward& x : all) {
    const ScaledColumns& c = x.scaled;
    if (c.scale) scale_columns_backward(c.d_core, c.d_scale, x.d_y, c.core, c.scale);
    const ConstTensor d_y = c.scale ? c.d_core : x.d_y;
    gemm(x.d_a, d_y, false, x.b, false, s, 0);
    gemm(x.d_b, d_y, true, x.a, false, 1, 1);
  }
}

void Backend::lora_a_rmsnorm_backward(Tensor d_weight, Tensor d_x, Tensor d_y, ConstTensor d_a,
                                      ConstTensor weight, ConstTensor /*a*/, float /*s*/,
                                      const Dropout& d, RowIds ids, ConstTensor x, ConstTensor w,
                                      ConstTensor r, ConstTensor /*row_dots*/, Tensor y,
                                      Tensor room) {
  rmsnorm_again(y, x, w, r);
  lora_a_backward(d_weight, d_y, d_a, y, weight, d, ids, room);
  rmsnorm_backward(d_x, d_y, x, w, r);
}

void Backend::lora_a_router_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, ConstTensor d_a,
                                     ConstTensor d_logits, ConstTensor x, ConstTensor weight,
                                     ConstTensor wg, const Dropout& d, RowIds ids, Tensor room) {
  lora_a_backward(d_weight, d_x, d_a, x, weight, d, ids, room);
  router_backward(d_wg, d_x, d_logits, x, wg);
}

void Backend::lora_a_router(Tensor a, Tensor logits, ConstTensor x, ConstTensor weight,
                            ConstTensor wg, float s, const Dropout& d, RowIds ids, Tensor room) {
  router_logits(logits, x, wg);
  lora_a(a, x, weight, s, d, ids, room);
}

void Backend::lora_a_router_rmsnorm_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, Tensor d_y,
                                             ConstTensor d_a, ConstTensor d_logits,
                                             ConstTensor weight, ConstTensor wg, const Dropout& d,
                                             RowIds ids, ConstTensor x, ConstTensor w,
                                             ConstTensor r, ConstTensor /*row_dots*/,
                                             ConstTensor /*logits*/, Tensor y, Tensor room) {
  rmsnorm_again(y, x, w, r);
  lora_a_router_backward(d_weight, d_wg, d_y, d_a, d_logits, y, weight, wg, d, ids, room);
  rmsnorm_backward(d_x, d_y, x, w, r);
}

void Backend::add_lora_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                               const LowRank& update, ConstTensor w, float eps) {
  if (update.a) gemm(delta, update.a, false, update.b, true, 1, 1);
  if (update.a && update.scale) {
    scale_columns(y, delta, update.scale);
    delta = y;
  }
  add_rmsnorm(sum, y, r, x, delta, w, eps);
}

void Backend::lora_rope(Tensor y, const std::array<LowRank, 3>& updates, ConstTensor table,
                        RowIds ids, Heads heads) {
  std::int64_t at = 0;
  for (const LowRank& u : updates) {
    const std::int64_t width = (at == 0 ? heads.heads : heads.kv_heads) * heads.head_dim;
    const Tensor own = y.col_range(at, at + width);
    if (u.a) gemm(own, u.a, false, u.b, true, 1, 1);
    if (u.a && u.scale) scale_columns(own, own, u.scale);
    at += width;
  }
  rope(y, y, table, ids, heads, false);
}

void Backend::add_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                ConstTensor z, ConstTensor b, const Slots& slots, ConstTensor w,
                                float eps, Tensor room) {
  slots_to_columns(room, z, slots, false);
  gemm(delta, room, false, b, true, 1, 1);
  add_rmsnorm(sum, y, r, x, delta, w, eps);
}

void Backend::combine_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                    Tensor core, ConstTensor z, ConstTensor b, ConstTensor scale,
                                    const Slots& slots, ConstTensor w, float eps, Tensor room) {
  slots_to_columns(room, z, slots, true);
  gemm(core.reshaped({room.rows(), core.cols()}), room, false, b, true, 1, 1);
  slot_combine(delta, core, scale, slots);
  add_rmsnorm(sum, y, r, x, delta, w, eps);
}

void Backend::slots_b_backward(Tensor d_b, Tensor q, ConstTensor d_y, ConstTensor z, ConstTensor b,
                               const Slots& slots, const ScaledSlots& scaled, Tensor room) {
  slot_combine_backward(scaled.d_core, scaled.d_weight, scaled.d_scale, d_y, scaled.core,
                        scaled.scale, slots);
  slots_to_columns(room, z, slots, true);
  const LowRankBackward one{d_b, q, scaled.d_core.reshaped({room.rows(), d_y.cols()}), room, b};
  lora_b_backward({&one, 1}, 1);
}

}  // namespace mixlora
