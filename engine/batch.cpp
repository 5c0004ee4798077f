#include "engine/batch.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "engine/error.h"

namespace mixlora {

std::int64_t step_count(const TrainSpec& spec, std::int64_t items) {
  if (items == 0) return 0;
  const std::int64_t per_epoch = (items + spec.batch_size - 1) / spec.batch_size;
  const auto steps =
      static_cast<std::int64_t>(std::ceil(static_cast<double>(per_epoch) * spec.num_epochs - 1e-9));
  return spec.max_steps > 0 ? std::min(steps, spec.max_steps) : steps;
}

double learning_rate(const TrainSpec& spec, std::int64_t step, std::int64_t steps) {
  const auto total = static_cast<double>(steps), at = static_cast<double>(step - 1);
  const double warm = spec.warmup_steps > 0 ? static_cast<double>(spec.warmup_steps)
                                            : std::ceil(spec.warmup_ratio * total);
  if (at < warm) return spec.lr * at / std::max(1.0, warm);
  const double progress = (at - warm) / std::max(1.0, total - warm);
  switch (spec.scheduler_type) {
    case Schedule::constant:
    case Schedule::constant_with_warmup:
      return spec.lr;
    case Schedule::linear:
      return spec.lr * std::max(0.0, 1 - progress);
    case Schedule::cosine:
    case Schedule::cosine_with_restarts:  // one cycle: the same curve
      return spec.lr * std::max(0.0, 0.5 * (1 + std::cos(std::numbers::pi * progress)));
    case Schedule::polynomial: {
      constexpr double kEnd = 1e-7;
      return progress >= 1 ? kEnd : (spec.lr - kEnd) * (1 - progress) + kEnd;
    }
    case Schedule::inverse_sqrt: {
      const double timescale = warm > 0 ? warm : 10000;
      return spec.lr / std::sqrt((at + timescale - warm) / timescale);
    }
  }
  throw std::logic_error("learning_rate: no such schedule");
}

SampleOrder::SampleOrder(const TrainSpec& spec, const std::vector<TrainItem>& items) {
  const auto n = static_cast<std::int64_t>(items.size());
  const std::int64_t steps = step_count(spec, n), batch = spec.batch_size;
  const std::int64_t micro = spec.micro_batch_size > 0 ? spec.micro_batch_size : batch;
  per_epoch_ = std::max<std::int64_t>(1, (n + batch - 1) / batch);
  const RandomKey key = random_key(spec.seed, Purpose::shuffle);
  std::vector<std::int64_t> order(items.size());
  for (std::int64_t step = 0; step < steps; ++step) {
    const std::int64_t epoch = step / per_epoch_, in_epoch = step % per_epoch_;
    if (in_epoch == 0) {  // Fisher-Yates, one Philox word a swap
      std::iota(order.begin(), order.end(), 0);
      for (std::int64_t i = n - 1; i > 0; --i) {
        const Philox4 bits = philox(static_cast<std::uint32_t>(i),
                                    static_cast<std::uint32_t>(epoch), 0, 0, key.k0, key.k1);
        const auto j = static_cast<std::int64_t>(
            (static_cast<std::uint64_t>(bits.v[0]) * static_cast<std::uint64_t>(i + 1)) >> 32);
        std::swap(order[static_cast<std::size_t>(i)], order[static_cast<std::size_t>(j)]);
      }
      if (spec.group_by_length) {  // longest first within runs of 50 batches, as Hugging Face's
                                   // sampler
        for (std::int64_t from = 0; from < n; from += 50 * batch)
          std::stable_sort(order.begin() + from, order.begin() + std::min(n, from + 50 * batch),
                           [&](std::int64_t a, std::int64_t b) {
                             return items[static_cast<std::size_t>(a)].tokens.size() >
                                    items[static_cast<std::size_t>(b)].tokens.size();
                           });
      }
    }
    auto& pieces = steps_.emplace_back();
    const std::int64_t begin = in_epoch * batch, end = std::min(n, begin + batch);
    for (std::int64_t at = begin; at < end; at += micro)
      pieces.emplace_back(order.begin() + at, order.begin() + std::min(end, at + micro));
  }
}

void HostBatch::begin_part(std::size_t job) {
  const auto label = static_cast<std::int64_t>(targets.size());
  const auto sequence = static_cast<std::int64_t>(sequences.size()) / 4;
  parts.push_back({job, rows(), rows(), sequence, sequence, label, label});
}
void HostBatch::end_part() {
  parts.back().row_end = rows();
  parts.back().sequence_end = static_cast<std::int64_t>(sequences.size()) / 4;
  parts.back().label_end = static_cast<std::int64_t>(targets.size());
}

std::int32_t HostBatch::add_sequence(const std::vector<std::int32_t>& text, std::int32_t sample,
                                     std::int32_t step, std::int32_t position,
                                     std::int32_t prefix_begin, std::int32_t prefix_length) {
  const auto begin = static_cast<std::int32_t>(rows()),
             length = static_cast<std::int32_t>(text.size());
  const auto base = static_cast<std::int32_t>(parts.back().row_begin);
  tokens.insert(tokens.end(), text.begin(), text.end());
  const auto adapter = static_cast<std::int32_t>(parts.back().job);
  for (std::int32_t i = 0; i < length; ++i)
    ids.insert(ids.end(), {sample, position + i, step, adapter});
  sequences.insert(sequences.end(), {begin, length, prefix_begin, prefix_length});
  own_sequences.insert(own_sequences.end(),
                       {begin - base, length, prefix_begin - base, prefix_length});
  max_length = std::max<std::int64_t>(max_length, length);
  max_prefix = std::max<std::int64_t>(max_prefix, prefix_length);
  return begin;
}

void HostBatch::add_label(std::int32_t row, std::int32_t target, float weight) {
  label_rows.push_back(row);
  targets.push_back(target);
  weights.push_back(weight);
}

std::optional<SelectedRows> selected_rows(const HostBatch& batch) {
  SelectedRows out;
  for (const BatchPart& p : batch.parts) {
    const auto from = batch.label_rows.begin() + p.label_begin,
               to = batch.label_rows.begin() + p.label_end;
    std::vector<std::int32_t> own(from, to);
    std::sort(own.begin(), own.end());
    own.erase(std::unique(own.begin(), own.end()), own.end());
    if (own.empty()) return std::nullopt;
    const auto begin = static_cast<std::int64_t>(out.rows.size());
    out.begin.push_back(begin);
    for (auto label = from; label != to; ++label)
      out.label_rows.push_back(static_cast<std::int32_t>(
          begin + (std::lower_bound(own.begin(), own.end(), *label) - own.begin())));
    for (const std::int32_t row : own) {
      out.rows.push_back(row - static_cast<std::int32_t>(p.row_begin));
      const auto ids = batch.ids.begin() + std::int64_t{4} * row;
      out.ids.insert(out.ids.end(), ids, ids + 4);
    }
  }
  out.begin.push_back(static_cast<std::int64_t>(out.rows.size()));
  if (out.begin.back() > most_selected(batch.rows())) return std::nullopt;
  return out;
}

namespace {
std::int64_t first_label(const TrainItem& item, TrainOn train_on) {
  return train_on == TrainOn::answer ? std::max<std::int64_t>(1, item.answer_begin) : 1;
}
}  // namespace

std::int64_t label_count(const TrainItem& item, TrainOn train_on) {
  return std::max<std::int64_t>(
      0, static_cast<std::int64_t>(item.tokens.size()) - first_label(item, train_on));
}

void add_item(HostBatch& batch, const TrainItem& item, std::int64_t sample, std::int64_t step,
              TrainOn train_on, float weight) {
  const std::int32_t begin = batch.add_sequence(item.tokens, static_cast<std::int32_t>(sample),
                                                static_cast<std::int32_t>(step));
  const auto length = static_cast<std::int64_t>(item.tokens.size());
  for (std::int64_t t = first_label(item, train_on); t < length; ++t)
    batch.add_label(begin + static_cast<std::int32_t>(t) - 1,
                    item.tokens[static_cast<std::size_t>(t)], weight);
}

}  // namespace mixlora
