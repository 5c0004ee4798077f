#include "engine/pass.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "engine/plan_backend.h"
#include "kernels/trace.h"

namespace mixlora {
namespace {

constexpr std::int64_t kMaxColumns = 256;  // distinct label tokens a scoring batch may offer

Capacity capacity_of(const HostBatch& b) {
  return {b.rows(), static_cast<std::int64_t>(b.sequences.size()) / 4,
          static_cast<std::int64_t>(b.targets.size())};
}
template <class T>
Tensor put(Backend& ops, Tensor room, const std::vector<T>& numbers, std::int64_t columns) {
  const auto rows = static_cast<std::int64_t>(numbers.size()) / columns;
  Tensor view = room;
  view.shape = columns == 1 ? Shape{rows} : Shape{rows, columns};
  view.stride = view.shape.last();
  if (rows > 0) ops.upload(view, numbers.data());
  return view;
}
Tensor first(Tensor room, std::int64_t n) {
  room.shape = Shape{n};
  room.stride = n;
  return room;
}
Tensor piece(Tensor room, std::int64_t begin, std::int64_t end) {
  return room.col_range(begin, end).reshaped({end - begin});
}

}  // namespace

Pass::Pass(Backend& ops, const Model& model, std::vector<DeviceAdapter*> adapters,
           const Capacity& capacity, bool training, Recompute recompute)
    : ops_(ops),
      model_(model),
      adapters_(std::move(adapters)),
      training_(training),
      narrow_(!training || capacity.labels <= most_selected(capacity.rows)),
      inputs_("inputs"),
      transformer_(ops, model, kept_, scratch_, recompute) {
  const auto i32 = [&](const char* name, Tensor& t, Shape s) {
    inputs_.declare(name, t, s, DType::i32);
  };
  const auto f32 = [&](const char* name, Tensor& t, Shape s) {
    inputs_.declare(name, t, s, DType::f32);
  };
  i32("tokens", tokens_, {capacity.rows});
  i32("ids", ids_, {capacity.rows, 4});
  i32("sequences", sequences_, {capacity.sequences, 4});
  i32("own_sequences", own_sequences_, {capacity.sequences, 4});
  i32("label_rows", label_rows_, {capacity.labels});
  const std::int64_t most = std::min(capacity.rows, capacity.labels);
  i32("selected", selected_, {most});
  i32("selected_ids", selected_ids_, {most, 4});
  i32("targets", targets_, {capacity.labels});
  f32("weights", weights_, {capacity.labels});
  f32("losses", losses_, {capacity.labels});
  f32("greedy", greedy_, {capacity.labels});
  i32("columns", columns_, {kMaxColumns});
  f32("sums", sums_, {static_cast<std::int64_t>(adapters_.size())});
  inputs_.commit(ops);
}

Pass::Pass(Backend& ops, const Model& model, std::vector<DeviceAdapter*> adapters,
           const HostBatch& largest, bool training, Recompute recompute)
    : Pass(ops, model, adapters, capacity_of(largest), training, recompute) {
  PlanBackend plan(ops);
  Pass dry(plan, model, adapters_, capacity_of(largest), training, recompute);
  dry.run_largest(largest);
  kept_.commit(ops, dry.kept_.high_water());
  scratch_.commit(ops, dry.scratch_.high_water());
}

std::size_t Pass::planned_bytes(Backend& ops, const Model& model,
                                const std::vector<DeviceAdapter*>& adapters,
                                const HostBatch& largest, bool training, Recompute recompute) {
  PlanBackend plan(ops);
  Pass dry(plan, model, adapters, capacity_of(largest), training, recompute);
  dry.run_largest(largest);
  return dry.inputs_.bytes() + dry.kept_.high_water() + dry.scratch_.high_water();
}

void Pass::run_largest(const HostBatch& largest) {
  constexpr auto kEndless = std::numeric_limits<std::size_t>::max() / 4;
  kept_.commit(ops_, kEndless);
  scratch_.commit(ops_, kEndless);
  for (DeviceAdapter* a : adapters_)
    if (a != nullptr) a->mark_changed();
  // Memory grows with the rows that are handed on, and with all rows: the ends are enough.
  const bool narrow = std::exchange(narrow_, false);
  run(largest);
  narrow_ = narrow;
  HostBatch fewer = largest;
  if (!training_) {  // one part, of more labels than let it narrow, perhaps
    const std::int64_t labels = std::min(fewer.parts[0].label_end, most_selected(largest.rows()));
    for (auto* v : {&fewer.label_rows, &fewer.targets}) v->resize(static_cast<std::size_t>(labels));
    fewer.weights.resize(fewer.targets.size());
    fewer.parts[0].label_end = labels;
  }
  if (narrow) run(fewer);
  for (DeviceAdapter* a : adapters_)  // nothing was computed
    if (a != nullptr) a->mark_changed();
}

void Pass::run(const HostBatch& batch) {
  if (training_) {
    train(batch, std::vector<float>(batch.parts.size(), 1.0F));
  } else {
    std::vector<float> log_prob, greedy;
    log_probs(batch, log_prob, greedy);
    label_logits(batch, std::vector<std::int32_t>(kMaxColumns));
  }
}

Step Pass::upload(const HostBatch& batch) {
  Step s;
  s.rows = batch.rows();
  s.training = training_;
  s.tokens = put(ops_, tokens_, batch.tokens, 1);
  s.ids = put(ops_, ids_, batch.ids, 4);
  const Tensor table = put(ops_, sequences_, batch.sequences, 4),
               own = put(ops_, own_sequences_, batch.own_sequences, 4);
  s.sequences = {table, table.rows(), batch.max_length, batch.max_prefix};
  const std::optional<SelectedRows> selected = narrow_ ? selected_rows(batch) : std::nullopt;
  put(ops_, label_rows_, selected ? selected->label_rows : batch.label_rows, 1);
  if (selected) {
    s.selected = put(ops_, selected_, selected->rows, 1);
    s.selected_ids = put(ops_, selected_ids_, selected->ids, 4);
  }
  put(ops_, targets_, batch.targets, 1);
  put(ops_, weights_, batch.weights, 1);
  for (std::size_t j = 0; j < batch.parts.size(); ++j) {
    const BatchPart& p = batch.parts[j];
    const Sequences rows{own.row_range(p.sequence_begin, p.sequence_end),
                         p.sequence_end - p.sequence_begin, batch.max_length, batch.max_prefix};
    s.groups.push_back({p.row_begin, p.row_end, adapters_.at(p.job), rows, 1.0F});
    if (!selected) continue;
    s.groups.back().selected_begin = selected->begin[j];
    s.groups.back().selected_end = selected->begin[j + 1];
  }
  return s;
}

std::int64_t Pass::chunk() const {
  constexpr std::size_t kLogitsBytes = std::size_t{128} << 20;
  const std::size_t row =
      static_cast<std::size_t>(model_.config.vocab) * size_of(ops_.activation_type());
  return std::max<std::int64_t>(64, static_cast<std::int64_t>(kLogitsBytes / row) / 64 * 64);
}

void Pass::loss(const HostBatch& batch, ConstTensor hidden, Tensor d_hidden) {
  const trace::Range range(ops_, "loss");
  const auto labels = static_cast<std::int64_t>(batch.targets.size());
  const DType type = ops_.activation_type();
  ops_.zero(d_hidden);
  for (std::int64_t at = 0; at < labels; at += chunk()) {
    const std::int64_t end = std::min(labels, at + chunk()), m = end - at;
    const Scratch::Frame frame(scratch_);
    const Tensor h = scratch_.take({m, model_.config.hidden}, type),
                 logits = scratch_.take({m, model_.config.vocab}, type);
    ops_.gather_rows(h, hidden, piece(label_rows_, at, end));
    ops_.linear(logits, h, model_.head);
    ops_.cross_entropy(piece(losses_, at, end), logits, piece(targets_, at, end),
                       piece(weights_, at, end));
    ops_.linear_backward(h, logits, model_.head, false);
    ops_.scatter_add_rows(d_hidden, h, piece(label_rows_, at, end));
  }
}

void Pass::train(const HostBatch& batch, const std::vector<float>& aux_factors) {
  Step step = upload(batch);
  for (std::size_t j = 0; j < step.groups.size(); ++j)
    step.groups[j].aux_factor = aux_factors.at(j);
  const Scratch::Frame kept(kept_), frame(scratch_);
  const Tensor hidden = transformer_.forward(step);
  for (const Group& g : step.groups) {
    if (g.adapter == nullptr || !has_router(g.adapter->spec)) continue;
    const AdapterSpec& a = g.adapter->spec;
    const bool z = a.router_loss && a.routing_strategy == Routing::mixlora_switch;
    ops_.balance_loss(g.adapter->aux, g.adapter->fraction, g.adapter->stats, g.rows(),
                      a.router_loss ? static_cast<float>(a.router_aux_loss_coef) : 0,
                      z ? static_cast<float>(a.router_z_loss_coef) : 0,
                      a.router_aux_loss_scope == AuxScope::layer);
  }
  const Tensor d_hidden = scratch_.take(hidden.shape, hidden.dtype);
  loss(batch, hidden, d_hidden);
  transformer_.backward(step, d_hidden);
  for (const BatchPart& p : batch.parts)
    ops_.sum(piece(sums_, static_cast<std::int64_t>(p.job), static_cast<std::int64_t>(p.job) + 1),
             piece(losses_, p.label_begin, p.label_end));
}

std::vector<Pass::Losses> Pass::losses(const HostBatch& batch) const {
  std::vector<Losses> out(batch.parts.size());
  std::vector<float> sums(adapters_.size());
  ops_.download(sums.data(), sums_);
  for (std::size_t j = 0; j < out.size(); ++j) {
    const BatchPart& part = batch.parts[j];
    const DeviceAdapter* adapter = adapters_.at(part.job);
    out[j].loss = sums.at(part.job);
    if (adapter == nullptr || !has_router(adapter->spec)) continue;
    std::array<float, 2> aux{};
    ops_.download(aux.data(), adapter->aux);
    out[j].aux = static_cast<double>(aux[0]) + static_cast<double>(aux[1]);
    out[j].stats.resize(static_cast<std::size_t>(adapter->stats.numel()));
    ops_.download(out[j].stats.data(), adapter->stats);
    const std::size_t row = static_cast<std::size_t>(adapter->stats.cols()),
                      layers = model_.layers.size();
    for (std::size_t l = 0; l < layers; ++l)
      out[j].entropy +=
          static_cast<double>(out[j].stats[l * row + row - 1]) /
          static_cast<double>(static_cast<std::int64_t>(layers) * (part.row_end - part.row_begin));
  }
  return out;
}

void Pass::log_probs(const HostBatch& batch, std::vector<float>& log_prob,
                     std::vector<float>& greedy) {
  const Step step = upload(batch);
  const Scratch::Frame kept(kept_), frame(scratch_);
  const Tensor hidden = transformer_.forward(step);
  const auto labels = static_cast<std::int64_t>(batch.targets.size());
  for (std::int64_t at = 0; at < labels; at += chunk()) {
    const std::int64_t end = std::min(labels, at + chunk()), m = end - at;
    const Scratch::Frame inner(scratch_);
    const Tensor h = scratch_.take({m, model_.config.hidden}, hidden.dtype),
                 logits = scratch_.take({m, model_.config.vocab}, hidden.dtype);
    ops_.gather_rows(h, hidden, piece(label_rows_, at, end));
    ops_.linear(logits, h, model_.head);
    ops_.log_prob(piece(losses_, at, end), piece(greedy_, at, end), logits,
                  piece(targets_, at, end));
  }
  log_prob.resize(batch.targets.size());
  greedy.resize(batch.targets.size());
  if (labels == 0) return;
  ops_.download(log_prob.data(), first(losses_, labels));
  ops_.download(greedy.data(), first(greedy_, labels));
}

std::vector<float> Pass::label_logits(const HostBatch& batch,
                                      const std::vector<std::int32_t>& columns) {
  const auto n = static_cast<std::int64_t>(columns.size()),
             m = static_cast<std::int64_t>(batch.targets.size());
  const std::int64_t d = model_.config.hidden;
  if (n > kMaxColumns)
    throw std::logic_error("label_logits: more than 256 distinct labels in a batch");
  const Step step = upload(batch);
  const Tensor index = put(ops_, columns_, columns, 1);
  const Scratch::Frame kept(kept_), frame(scratch_);
  const Tensor hidden = transformer_.forward(step);
  const Tensor h = scratch_.take({m, d}, hidden.dtype),
               rows = scratch_.take({n, d}, ops_.matrix_type()),
               logits = scratch_.take({m, n}, DType::f32);
  Tensor same = rows;
  ops_.gather_rows(h, hidden, first(label_rows_, m));
  ops_.gather_rows(rows, ops_.matrix_rows(model_.head), index);
  if (rows.dtype != h.dtype) {
    same = scratch_.take({n, d}, h.dtype);
    ops_.copy(same, rows);
  }
  ops_.gemm(logits, h, false, same, true, 1, 0);
  std::vector<float> out(static_cast<std::size_t>(m * n));
  ops_.download(out.data(), logits);
  return out;
}

std::vector<float> Pass::logits(const HostBatch& batch) {
  const Step step = upload(batch);
  const Scratch::Frame kept(kept_), frame(scratch_);
  const Tensor hidden = transformer_.forward(step);
  const std::int64_t v = model_.config.vocab;
  std::vector<float> out(static_cast<std::size_t>(step.rows * v));
  const std::int64_t rows_each =
      std::max<std::int64_t>(1, chunk() / 4);  // bf16 rows and their f32 copies fit the plan
  for (std::int64_t at = 0; at < step.rows; at += rows_each) {
    const std::int64_t end = std::min(step.rows, at + rows_each);
    const Scratch::Frame inner(scratch_);
    const Tensor part = scratch_.take({end - at, v}, hidden.dtype);
    ops_.linear(part, hidden.row_range(at, end), model_.head);
    Tensor numbers = part;
    if (part.dtype != DType::f32) {
      numbers = scratch_.take({end - at, v}, DType::f32);
      ops_.copy(numbers, part);
    }
    ops_.download(out.data() + at * v, numbers);
  }
  return out;
}

}  // namespace mixlora
