// Backend: the engine's instruction set, every operation of a training step, once.
#pragma once
#include <array>
#include <memory>
#include <span>
#include <string>

#include "kernels/arena.h"
#include "kernels/random.h"
#include "kernels/tensor.h"

namespace mixlora {

/// A frozen matrix W (O, I) as the backend keeps it: plain rows first, then whatever packed form
/// multiplies fastest. `storage` is bytes; see Backend::matrix_bytes.
struct FrozenMatrix {
  Tensor storage;  // (matrix_bytes / 4) i32
  std::int64_t out = 0, in = 0;
  DType dtype = DType::f32;
  const void* packed = nullptr;  // the backend's own handle, set by pack_matrix
};

/// Which numbers identify a row: (N, 4) i32 of {sample, position, step, adapter}. All randomness is
/// keyed by them, so a row's masks do not depend on what else is in the batch.
using RowIds = ConstTensor;

/// Inverted dropout of one input: kept elements are divided by (1 - p). Inactive when p == 0.
struct Dropout {
  float p = 0;
  std::uint64_t seed = 0;
  std::int32_t layer = 0;
  std::uint32_t site = 0;
  bool active() const { return p > 0; }
};

/// Sequences lie end to end. Sequence s owns rows [begin, begin + length); its rows also see the
/// `prefix_length` rows from `prefix_begin` (rows of this step that belong to another sequence),
/// and then itself causally.
struct Sequences {
  ConstTensor table;            // (S, 4) i32: begin, length, prefix_begin, prefix_length
  std::int64_t count = 0;       // S
  std::int64_t max_length = 0;  // longest own length
  std::int64_t max_prefix = 0;  // longest prefix; 0 when no sequence has one
};

/// The least size of a scale that dora_scale gives.
inline constexpr float kLeastScale = 1e-20F;

/// One call of dora_scale.
struct DoraScale {
  Tensor scale, inverse_norm;
  ConstTensor m, w_squared, a, wa, b;
  float s = 1;
};

/// DoRA's gradients by column: of a scale m / n, and of its magnitude.
struct DoraMagnitude {
  Tensor d_m, d_scale;
  ConstTensor inverse_norm;
};

/// What a low-rank update makes of y: scale (y + a B^T), by column. Absent when `a` is.
struct LowRank {
  ConstTensor a, b;   // (N, R), (O, R)
  ConstTensor scale;  // (O) f32: DoRA's m / n; absent = 1
};
/// DoRA's y = scale core, and where scale_columns_backward's gradients go. Absent where `scale` is.
struct ScaledColumns {
  ConstTensor core, scale;  // (N, O), (O) f32
  Tensor d_core, d_scale;   // overwritten, may be d_y; added to
};
/// One call of lora_b_backward.
struct LowRankBackward {
  Tensor d_b, d_a;        // (O, R) f32, added to; (N, R)
  ConstTensor d_y, a, b;  // (N, O), (N, R), (O, R)
  ScaledColumns scaled = {};
};

/// DoRA's scale m / n of the columns of q, k and v, and its gradient. Absent where `scale` is.
struct QkvScale {
  ConstTensor scale;  // ((H + 2 Hkv) D) f32
  Tensor d_scale;     // the same, added to
};

/// Rows' dots. Where x -> c = x W^T and low-rank updates of x is linear, a row's <x, d_x> is its
/// <c, d_c>: what makes d_c from c can leave that, (N) f32, for the norm before x, whose backward
/// then need not read x and d_x for it. An operation asked for dots that it has no cheap way to
/// make leaves them as they are and returns false.

/// Grouped-query attention: H query heads, `kv_heads` key/value heads, D numbers a head.
struct Heads {
  std::int64_t heads = 0, kv_heads = 0, head_dim = 0;
};

enum class Activation : std::uint8_t { silu, gelu, gelu_new, relu };
enum class RouterKind : std::uint8_t { top_k, top_p, switch_top1 };
enum class Overflow : std::uint8_t { base, input };

struct Router {
  RouterKind kind = RouterKind::top_k;
  std::int64_t experts = 1;  // E
  std::int64_t slots = 1;    // K: top_k, E for top-p, 1 for switch
  float top_p = 0.8F;
  float temperature = 0;      // > 0 divides the probabilities of top-p
  std::int64_t capacity = 0;  // switch: tokens an expert takes from one sequence; 0 = no limit
  Overflow overflow = Overflow::base;
};

/// The experts a row uses. expert -1: the frozen projections alone (weight still applies);
/// weight 0: an empty slot. Both absent: E = K = 1 with weight 1, which is plain LoRA.
struct Slots {
  Tensor expert;  // (N, K) i32
  Tensor weight;  // (N, K) f32
  std::int64_t experts = 1, count = 1;
  std::int64_t rank = 0;  // R of each expert
};

/// What slots_b_backward reads and leaves of DoRA's scaled slots, as slot_combine_backward does.
struct ScaledSlots {
  ConstTensor core, scale;           // (K, N, D), (E, D) f32
  Tensor d_core, d_weight, d_scale;  // overwritten (K, N, D), (N, K) f32; added to
};

/// Trainable factors of one gated feed-forward block, in the compute type. Any may be absent.
struct MixtureWeights {
  ConstTensor gate_b, up_b;          // (E, F, R)
  ConstTensor down_a;                // (E, R, F)
  ConstTensor gate_scale, up_scale;  // (E, F) f32: DoRA's m / n; absent = 1
};
struct MixtureGrads {
  Tensor gate_b, up_b, down_a;  // f32, shapes as above
  Tensor gate_scale, up_scale;  // (E, F) f32: dLoss / d(m / n)
};
/// One call of the gated feed-forward mixture: what both directions read.
struct Mixture {
  ConstTensor gate_up;  // (N, 2F): c1 = W1 x | c3 = W3 x
  ConstTensor a;  // (N, 2 E R): s A1_e x~ of all experts | s A3_e x~ of all experts; may be absent
  MixtureWeights weights;
  Slots slots;
  Activation activation = Activation::silu;
  float scale = 1;        // s = alpha / r
  Dropout dropout;        // of the down projection's input; site + e for expert e
  RowIds ids;             // (N, 4)
  bool per_slot = false;  // true: the experts' outputs stay apart (DoRA on down_proj)
};

/// AdamW's numbers for one step, on the device so that a captured step can be replayed:
/// {lr, weight_decay, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t, max_grad_norm (0 = off)} f32.
/// For SGD: {lr, weight_decay, momentum, 0, 0, 0, 0, max_grad_norm}.
using StepNumbers = ConstTensor;  // (8) f32

/// Places in a backend's queue of calls, and when they were passed.
class TimeMarks {
 public:
  virtual ~TimeMarks() = default;
  /// Marks the place behind all calls so far; marks are numbered from 0.
  virtual std::size_t mark() = 0;
  /// From one mark to a later one; both must be passed (Backend::synchronize).
  virtual double seconds(std::size_t from, std::size_t to) const = 0;
  virtual void clear() = 0;
};

/// The instruction set.
///
/// Letters: N rows (tokens of all sequences, end to end), D model width, F FFN width, V vocabulary,
/// E experts, K slots a row, R rank, M rows of a selection. `d_x` is dLoss/dx.
/// Activations are f32 or bf16 (one type in a call unless said otherwise); statistics, losses,
/// router numbers, gradients of trainable parameters are f32. Every output is overwritten unless
/// the op says "adds". All sums have a fixed order: the same call gives the same bits.
/// Calls are enqueued; `synchronize` or `download` waits. Wrong shapes throw std::logic_error.
class Backend {
 public:
  virtual ~Backend() = default;
  virtual Device device() const = 0;
  /// The type activations are kept in (f32 on the CPU; f32 or bf16 on CUDA).
  virtual DType activation_type() const = 0;
  /// One line for people: the device, its instruction set, the library that multiplies.
  virtual std::string description() const = 0;

  // ---- memory ------------------------------------------------------------------------------
  /// A block of zeros. Throws std::bad_alloc when the device has no room.
  virtual std::unique_ptr<Memory> allocate(std::size_t bytes) = 0;
  /// dst = src (host, same type and numel, contiguous); src may be reused on return.
  virtual void upload(Tensor dst, const void* src) = 0;
  /// Waits for all work, then copies to the host.
  virtual void download(void* dst, ConstTensor src) = 0;
  virtual void synchronize() = 0;
  /// Bytes of the device in use by this backend now, and at most so far (arena blocks, packed
  /// weights, work space).
  virtual std::size_t allocated_bytes() const = 0;
  virtual std::size_t peak_bytes() const = 0;
  /// Bytes of the device in use as its driver says, by whatever process, its own needs included; on
  /// the host what this backend has.
  virtual std::size_t device_bytes() const { return allocated_bytes(); }
  /// Bytes the backend takes for itself (work space, handles) beside what it is asked for.
  virtual std::size_t workspace_bytes() const = 0;
  virtual void zero(Tensor x) = 0;
  /// dst = src, converting between f32 and bf16; strided views allowed.
  virtual void copy(Tensor dst, ConstTensor src) = 0;

  // ---- where a step is ---------------------------------------------------------------------
  /// What is called until the matching `leave` belongs to `range`, a literal ("layer", of index 3).
  /// An NVTX range of the domain "mixlora"; a comparison when no profiler listens. trace::Range
  /// calls both.
  virtual void enter(const char* range, std::int64_t index);
  virtual void leave();
  /// Marks on this backend's queue: the host's clock here, events of the stream on CUDA.
  virtual std::unique_ptr<TimeMarks> time_marks();
  /// Opens or closes what a profiler records that waits for it (cudaProfilerStart, ...Stop).
  virtual void profiler_window(bool /*open*/) {}

  // ---- frozen matrices ---------------------------------------------------------------------
  /// Bytes that a frozen (out, in) matrix takes here, packed forms included.
  virtual std::size_t matrix_bytes(std::int64_t out, std::int64_t in) const = 0;
  /// The type frozen matrices are kept in.
  virtual DType matrix_type() const = 0;
  /// Rows of W, (O, I) in matrix_type(), to be filled by upload before pack_matrix.
  virtual Tensor matrix_rows(const FrozenMatrix& w) const = 0;
  /// Makes the packed forms from the rows; call once, after they are filled.
  virtual void pack_matrix(FrozenMatrix& w) = 0;
  /// y = x W^T.  y (N, O)  x (N, I)
  virtual void linear(Tensor y, ConstTensor x, const FrozenMatrix& w) = 0;
  /// d_x = d_y W, added to d_x when `accumulate`.  d_x (N, I)  d_y (N, O)
  virtual void linear_backward(Tensor d_x, ConstTensor d_y, const FrozenMatrix& w,
                               bool accumulate) = 0;
  /// norms[o] = sum_i W[o, i]^2 in f32: DoRA's constant part.  norms (O) f32
  virtual void row_norms_squared(Tensor norms, const FrozenMatrix& w) = 0;

  // ---- small products (adapters) -----------------------------------------------------------
  /// c = alpha op(a) op(b) + beta c with op = transpose when the flag is set. c (M, N), inner K.
  /// a, b: the same type (f32 or bf16); c: that type or f32; strided views allowed; f32
  /// accumulation.
  virtual void gemm(Tensor c, ConstTensor a, bool transpose_a, ConstTensor b, bool transpose_b,
                    float alpha, float beta) = 0;

  // ---- rows --------------------------------------------------------------------------------
  /// y[n] = table[tokens[n]].  y (N, D)  table (V, D) matrix_type  tokens (N) i32
  virtual void embedding(Tensor y, ConstTensor table, ConstTensor tokens) = 0;
  /// y[m] = x[index[m]].  y (M, C)  x (N, C)  index (M) i32
  virtual void gather_rows(Tensor y, ConstTensor x, ConstTensor index) = 0;
  /// x[index[m]] += y[m]; no index twice.
  virtual void scatter_add_rows(Tensor x, ConstTensor y, ConstTensor index) = 0;
  /// y += x, same shape and type.
  virtual void add(Tensor y, ConstTensor x) = 0;

  // ---- normalisation -----------------------------------------------------------------------
  /// y = x r w, r = 1 / sqrt(mean(x^2) + eps)                       [Zhang & Sennrich 2019, eq. 4]
  /// y, x (N, D)  w (D) f32  r (N) f32, kept for backward
  virtual void rmsnorm(Tensor y, Tensor r, ConstTensor x, ConstTensor w, float eps) = 0;
  /// Adds r (w d_y - x r^2 mean(x w d_y)) to d_x.  d_x, d_y, x (N, D)
  virtual void rmsnorm_backward(Tensor d_x, ConstTensor d_y, ConstTensor x, ConstTensor w,
                                ConstTensor r) = 0;
  /// rmsnorm's y once more, to the bit, from the r it left.
  virtual void rmsnorm_again(Tensor y, ConstTensor x, ConstTensor w, ConstTensor r) = 0;
  /// sum = x + delta, then y = rmsnorm(sum). `sum` may be `x`, `y` may be `delta`.
  virtual void add_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, ConstTensor delta,
                           ConstTensor w, float eps) = 0;

  // ---- dropout and jitter ------------------------------------------------------------------
  /// y = mask / (1 - p) x by Philox (random.h row_bits).  y, x (N, C)  ids (N, 4); y may be x
  virtual void dropout(Tensor y, ConstTensor x, const Dropout& d, RowIds ids) = 0;
  /// d_x += mask / (1 - p) d_y, the same mask.
  virtual void dropout_backward_add(Tensor d_x, ConstTensor d_y, const Dropout& d, RowIds ids) = 0;
  /// y = x u, u ~ U(1 - amount, 1 + amount) a column, from row_bits at site_router.  y may be x
  virtual void jitter(Tensor y, ConstTensor x, float amount, std::uint64_t seed, std::int32_t layer,
                      RowIds ids) = 0;

  // ---- low-rank updates --------------------------------------------------------------------
  /// a = s drop(x) A^T.  a (N, R)  x (N, D)  weight A (R, D)  room (N, D) of x's type, overwritten;
  /// not read, and may be absent, when `d` is inactive
  ///                                                            [Hu et al. 2022, eq. 3, with PEFT's
  ///                                                            dropout before A]
  virtual void lora_a(Tensor a, ConstTensor x, ConstTensor weight, float s, const Dropout& d,
                      RowIds ids, Tensor room);
  /// d_weight += d_a^T drop(x); d_x += drop(d_a A), left out when d_x is absent.
  /// d_weight (R, D) f32  d_x (N, D)  d_a (N, R); room as above
  virtual void lora_a_backward(Tensor d_weight, Tensor d_x, ConstTensor d_a, ConstTensor x,
                               ConstTensor weight, const Dropout& d, RowIds ids, Tensor room);

  /// d_a = s d_y B; d_b += d_y^T a: several of as many rows at once. With a scale it comes first,
  /// and d_core is d_y to the rest.
  virtual void lora_b_backward(std::span<const LowRankBackward> all, float s);
  /// Both of A and of the norm y = x r w before it: d_y, y's gradient by other ways, becomes d_y +
  /// drop(d_a A); d_weight += d_a^T drop(y); rmsnorm_backward adds d_y's to d_x. y and room (N, D)
  /// are overwritten, as d_y may be. a (N, R) is what lora_a made of y with this s and d; it and
  /// d_a give the share of drop(d_a A) in a row's <y, d_y>, for what reads it before the product.
  /// row_dots (N) f32, may be absent: <y, d_y> of each row, drop(d_a A) in d_y.
  virtual void lora_a_rmsnorm_backward(Tensor d_weight, Tensor d_x, Tensor d_y, ConstTensor d_a,
                                       ConstTensor weight, ConstTensor a, float s, const Dropout& d,
                                       RowIds ids, ConstTensor x, ConstTensor w, ConstTensor r,
                                       ConstTensor row_dots, Tensor y, Tensor room);
  /// lora_a_backward, then router_backward, of one x.
  virtual void lora_a_router_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, ConstTensor d_a,
                                      ConstTensor d_logits, ConstTensor x, ConstTensor weight,
                                      ConstTensor wg, const Dropout& d, RowIds ids, Tensor room);
  /// lora_a and router_logits of one x.
  virtual void lora_a_router(Tensor a, Tensor logits, ConstTensor x, ConstTensor weight,
                             ConstTensor wg, float s, const Dropout& d, RowIds ids, Tensor room);
  /// lora_a_rmsnorm_backward with a router behind the norm too: d_y gets what
  /// lora_a_router_backward adds. row_dots as there, without the router's share, which `logits`,
  /// what it made of y, and d_logits give.
  virtual void lora_a_router_rmsnorm_backward(Tensor d_weight, Tensor d_wg, Tensor d_x, Tensor d_y,
                                              ConstTensor d_a, ConstTensor d_logits,
                                              ConstTensor weight, ConstTensor wg, const Dropout& d,
                                              RowIds ids, ConstTensor x, ConstTensor w,
                                              ConstTensor r, ConstTensor row_dots,
                                              ConstTensor logits, Tensor y, Tensor room);
  /// add_rmsnorm of x and scale (delta + a B^T). `delta` is overwritten: where there is a scale, by
  /// delta + a B^T.
  virtual void add_lora_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                const LowRank& update, ConstTensor w, float eps);
  /// y = rope(scale (y + a B^T)), in place: an update each for the columns of q, of k and of v.
  virtual void lora_rope(Tensor y, const std::array<LowRank, 3>& updates, ConstTensor table,
                         RowIds ids, Heads heads);

  // ---- DoRA --------------------------------------------------------------------------------
  /// n_o^2 = |W_o|^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T, scale = m / n
  ///                                            [Liu et al. 2024, eq. 5; factored: methods.md
  ///                                            section 1]
  /// scale, inverse_norm, m (O) f32  w_squared (O) f32  a (R, I)  wa (R, O) = A W^T  b (O, R), s =
  /// alpha / r. A scale nearer to 0 than kLeastScale is that, of m's sign: rows and gradients do
  /// not see it, and what was scaled by it can be had back.
  virtual void dora_scale(Tensor scale, Tensor inverse_norm, ConstTensor m, ConstTensor w_squared,
                          ConstTensor a, ConstTensor wa, ConstTensor b, float s) = 0;
  /// Several at once, of one type: few launches where those count.
  virtual void dora_scales(std::span<const DoraScale> all) {
    for (const DoraScale& x : all)
      dora_scale(x.scale, x.inverse_norm, x.m, x.w_squared, x.a, x.wa, x.b, x.s);
  }
  /// d_m += d_scale * inverse_norm, as n is a constant of the step; then d_scale = 0. Of each: f32,
  /// same numel.
  virtual void dora_magnitudes_backward(std::span<const DoraMagnitude> all) = 0;
  /// y = scale * core by column; y may be core.  y, core (N, O)  scale (O) f32
  virtual void scale_columns(Tensor y, ConstTensor core, ConstTensor scale) = 0;
  /// d_core = scale * d_y (may be d_y); d_scale[o] += sum_n d_y core.
  virtual void scale_columns_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y,
                                      ConstTensor core, ConstTensor scale) = 0;

  // ---- attention ---------------------------------------------------------------------------
  /// Rotary embedding of the first heads + kv_heads heads of each row, halves convention of
  /// Hugging Face's Llama; the rest (values) are copied.            [Su et al. 2021, eq. 34]
  /// y, x (N, (H + 2 Hkv) D); y may be x.  table (positions, D) f32: cos of D/2 angles | sin of D/2
  /// angles ids give the position. `inverse` turns the other way: the backward of the forward.
  virtual void rope(Tensor y, ConstTensor x, ConstTensor table, RowIds ids, Heads heads,
                    bool inverse) = 0;
  /// Backward of y = rope(scale * core), every column scaled, the values' too, from the gradient of
  /// scale * core, and y itself; scale ((H + 2 Hkv) D) f32.
  /// d_core = scale * d_y (may be d_y); d_scale[o] += sum_n d_y core, no scale being 0.
  virtual void scale_rope_backward(Tensor d_core, Tensor d_scale, ConstTensor d_y, ConstTensor y,
                                   ConstTensor scale, ConstTensor table, RowIds ids,
                                   Heads heads) = 0;
  /// o = softmax(q k^T / sqrt(D)) v, causal within a sequence, its prefix seen by all its rows.
  /// qkv (N, (H + 2 Hkv) D)  o (N, H D)  lse (N, H) f32 = log of the softmax's denominator
  virtual void attention(Tensor o, Tensor lse, ConstTensor qkv, const Sequences& s,
                         Heads heads) = 0;
  /// d_qkv overwritten. Prefix rows collect from every sequence that saw them.
  virtual void attention_backward(Tensor d_qkv, ConstTensor d_o, ConstTensor qkv, ConstTensor o,
                                  ConstTensor lse, const Sequences& s, Heads heads) = 0;
  /// attention_backward, then d_q and d_k turned back by rope's inverse and, with a scale,
  /// scale_rope_backward in place: one pass where that pays. row_dots (N) f32, may be absent: <q,
  /// d_q> + <k, d_k> + <v, d_v> over all heads, which neither turning both sides nor moving a scale
  /// to the other one changes. Returns whether it left them.
  virtual bool attention_rope_backward(Tensor d_qkv, Tensor /*row_dots*/, ConstTensor d_o,
                                       ConstTensor qkv, ConstTensor o, ConstTensor lse,
                                       const Sequences& s, ConstTensor table, RowIds ids,
                                       Heads heads, const QkvScale& scale) {
    attention_backward(d_qkv, d_o, qkv, o, lse, s, heads);
    rope(d_qkv, d_qkv, table, ids, heads, true);
    if (scale.scale)
      scale_rope_backward(d_qkv, scale.d_scale, d_qkv, qkv, scale.scale, table, ids, heads);
    return false;
  }

  // ---- routing -----------------------------------------------------------------------------
  /// logits = x Wg^T in f32.  logits (N, E) f32  x (N, D)  wg (E, D) f32
  virtual void router_logits(Tensor logits, ConstTensor x, ConstTensor wg) = 0;
  /// probabilities = softmax(logits); slots by the router's kind (methods.md section 2); stats of
  /// this call. stats (2 E + 2) f32 overwritten: for each expert how many slots chose it (before
  /// capacity), for each the sum of its probability, then sum of logsumexp^2, then sum of the
  /// entropy in nats.
  virtual void route(Slots& slots, Tensor probabilities, Tensor stats, ConstTensor logits,
                     const Router& router, const Sequences& s) = 0;
  /// loss[0] = coef E sum_i f_i P_i with f, P means over all L rows of `stats` (global) or the mean
  /// of the layers' own (layer); loss[1] = z_coef mean(logsumexp^2); fraction (L, E) = the f each
  /// layer's backward uses, already divided by the layers it averages over. stats (L, 2 E + 2),
  /// `rows` tokens a layer.
  virtual void balance_loss(Tensor loss, Tensor fraction, ConstTensor stats, std::int64_t rows,
                            float coef, float z_coef, bool per_layer) = 0;
  /// d_logits from d_weight (N, K) by the router's kind, plus factor * coef E / M p_j (f_j - sum_i
  /// p_i f_i) [M = rows, f already averaged over layers], plus factor * z_coef 2 lse p_j / (rows *
  /// layers). d_logits (N, E) f32  fraction (E) f32 one layer's row of balance_loss
  virtual void route_backward(Tensor d_logits, ConstTensor d_weight, const Slots& slots,
                              ConstTensor probabilities, ConstTensor logits, ConstTensor fraction,
                              const Router& router, float coef, float z_coef, std::int64_t layers,
                              float factor) = 0;
  /// d_wg += d_logits^T x; d_x += d_logits Wg.  d_wg (E, D) f32  d_x, x (N, D)
  virtual void router_backward(Tensor d_wg, Tensor d_x, ConstTensor d_logits, ConstTensor x,
                               ConstTensor wg) = 0;

  // ---- gated feed-forward with experts -----------------------------------------------------
  /// For each slot k of row n, e its expert (e = -1: no deltas, scales 1, z = 0):
  ///   u = c1_e (c1 + B1_e a1_e), v = c3_e (c3 + B3_e a3_e), h_k = act(u) v, z_k = s A2_e drop(h_k)
  /// out (N, F) = sum_k w_k h_k, or (K, N, F) = h_k when per_slot.  z (N, K R), absent without
  /// down_a
  ///                                                            [methods.md sections 2 and 3.4]
  virtual void mixture(Tensor out, Tensor z, const Mixture& m) = 0;
  /// d_out: (N, F) = d_y W2 shared by the slots, or (K, N, F) with w_k already inside when
  /// per_slot. q: d_y B2 of all experts, (N, E R), or (K N, E R) with w_k inside when per_slot;
  /// absent without down_a.
  ///   dh_k = w_k (d_out + s drop(A2_e^T q_e))          (w_k = 1 when per_slot)
  ///   d_weight (N, K) f32 = <h_k, d_out> + <z_k, q_e>  (not written when per_slot)
  ///   d_gate_up (N, 2F) = sum over slots; p (N, 2 E R) = s B^T d(c + B a), zero where not chosen
  ///   gradients added: d_gate_b, d_up_b, d_down_a, d_gate_scale, d_up_scale
  ///   row_dots (N) f32, may be absent: sum over slots of <u, d_u> + <v, d_v>
  /// Returns whether it left row_dots.
  virtual bool mixture_backward(Tensor d_gate_up, Tensor d_weight, Tensor p, Tensor row_dots,
                                const MixtureGrads& grads, ConstTensor d_out, ConstTensor q,
                                ConstTensor z, const Mixture& m) = 0;
  /// Spreads z over the columns of its expert, zero elsewhere: (N, E R) with w_k when not per_slot,
  /// (K N, E R) row k N + n without w_k when per_slot. Used as y += columns B2^T.  z (N, K R)
  virtual void slots_to_columns(Tensor columns, ConstTensor z, const Slots& slots,
                                bool per_slot) = 0;
  /// y (N, D) = sum_k w_k scale_e core_k.  core (K, N, D)  scale (E, D) f32 (1 for e = -1)
  virtual void slot_combine(Tensor y, ConstTensor core, ConstTensor scale, const Slots& slots) = 0;
  /// add_rmsnorm of x and delta + sum_k w_k z_k B_e^T (nothing for e = -1), no row having an expert
  /// twice. `delta` is overwritten, as is room (N, E R) of its type.  z (N, K R)  b (D, E R)
  virtual void add_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                 ConstTensor z, ConstTensor b, const Slots& slots, ConstTensor w,
                                 float eps, Tensor room);
  /// core_k += z_k B_e^T (nothing for e = -1), then add_rmsnorm of x and slot_combine's y of core.
  /// delta (N, D) and room (K N, E R) of their type are overwritten.  core (K, N, D)  z (N, K R)
  /// b (D, E R)  scale (E, D)
  virtual void combine_slots_rmsnorm(Tensor sum, Tensor y, Tensor r, ConstTensor x, Tensor delta,
                                     Tensor core, ConstTensor z, ConstTensor b, ConstTensor scale,
                                     const Slots& slots, ConstTensor w, float eps, Tensor room);
  /// d_core (K, N, D) = w_k scale_e d_y; d_weight (N, K) = sum_j d_y scale_e core_k; d_scale (E, D)
  /// += sum d_y w_k core_k
  virtual void slot_combine_backward(Tensor d_core, Tensor d_weight, Tensor d_scale,
                                     ConstTensor d_y, ConstTensor core, ConstTensor scale,
                                     const Slots& slots) = 0;
  /// slot_combine_backward, then of z_k B_e^T in core_k, no row having an expert twice:
  ///   q (K N, E R), row k N + n = d_core_k B_e in its expert's ranks; others are not to be read
  ///   d_b (D, E R) f32 += d_core_k^T z_k in the ranks of e
  /// d_y (N, D)  z (N, K R)  b (D, E R)  room (K N, E R) of their type, overwritten
  virtual void slots_b_backward(Tensor d_b, Tensor q, ConstTensor d_y, ConstTensor z, ConstTensor b,
                                const Slots& slots, const ScaledSlots& scaled, Tensor room);
  /// Rows over capacity under Overflow::input give y = w x instead of the block's output:
  /// y[n] = weight[n] x[n] where expert is -1 and overflow is input; others untouched.
  virtual void overflow_input(Tensor y, ConstTensor x, const Slots& slots) = 0;
  /// Backward of overflow_input: for those rows d_x += w d_y, d_weight = <d_y, x>, and d_y becomes
  /// 0.
  virtual void overflow_input_backward(Tensor d_x, Tensor d_weight, Tensor d_y, ConstTensor x,
                                       const Slots& slots) = 0;

  // ---- loss --------------------------------------------------------------------------------
  /// loss[m] = -weight[m] log softmax(logits[m])[target[m]]; logits become d_logits.
  /// logits (M, V)  target (M) i32  weight (M) f32  loss (M) f32
  virtual void cross_entropy(Tensor loss, Tensor logits, ConstTensor target,
                             ConstTensor weight) = 0;
  /// log_prob[m] = log softmax(logits[m])[target[m]] in f32; greedy[m] = 1 when target is the
  /// argmax (first wins).
  virtual void log_prob(Tensor log_prob, Tensor greedy, ConstTensor logits, ConstTensor target) = 0;

  // ---- optimizer ---------------------------------------------------------------------------
  /// out[0] = sum x^2 (added to when `accumulate`), in a fixed order.  x flat f32
  virtual void sum_squares(Tensor out, ConstTensor x, bool accumulate) = 0;
  /// out[index] = sum x, fixed order.  x flat f32, out (any) f32
  virtual void sum(Tensor out, ConstTensor x) = 0;
  /// AdamW with decoupled decay [Loshchilov & Hutter 2019, alg. 2] on flat f32 ranges; gradients
  /// are scaled by min(1, max_grad_norm / (norm + 1e-6)) when max_grad_norm > 0. `compute` = w in
  /// the activation type (absent when that is f32). The gradient is left as it is.
  virtual void adamw(Tensor w, Tensor compute, ConstTensor g, Tensor m, Tensor v,
                     StepNumbers numbers, ConstTensor norm_squared) = 0;
  /// v = momentum v + (g + wd w); w -= lr v (v absent: no momentum).
  virtual void sgd(Tensor w, Tensor compute, ConstTensor g, Tensor v, StepNumbers numbers,
                   ConstTensor norm_squared) = 0;
};

enum class Precision : std::uint8_t { automatic, fp32, bf16 };

/// The CPU. `threads` 0: all cores. bf16 multiplies frozen matrices in bf16 where the CPU can
/// (AVX512_BF16).
std::unique_ptr<Backend> make_cpu_backend(Precision precision = Precision::automatic,
                                          int threads = 0);
/// One CUDA device. Throws std::runtime_error saying what is missing when there is none or the
/// build has no CUDA.
std::unique_ptr<Backend> make_cuda_backend(Precision precision = Precision::automatic,
                                           int device = 0);
/// Why make_cuda_backend would fail here; empty when it would not.
std::string cuda_unavailable_reason();

}  // namespace mixlora
