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

}  // namespace mixlora
