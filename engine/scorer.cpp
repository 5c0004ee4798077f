#include "engine/scorer.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "engine/device_adapter.h"
#include "engine/error.h"
#include "engine/pass.h"

namespace mixlora {
namespace {

/// Indices by falling size, ties by index: batches of like lengths, and the same ones on every run.
template <class Size> std::vector<std::size_t> longest_first(std::size_t n, Size&& size) {
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return size(a) > size(b); });
  return order;
}

/// Cuts `order` into runs whose sizes sum to at most `limit` (one item at least).
template <class Size>
std::vector<std::vector<std::size_t>> packed(const std::vector<std::size_t>& order,
                                             std::int64_t limit, Size&& size) {
  std::vector<std::vector<std::size_t>> runs;
  std::int64_t used = 0;
  for (const std::size_t i : order) {
    if (runs.empty() || used + size(i) > limit) {
      runs.emplace_back();
      used = 0;
    }
    runs.back().push_back(i);
    used += size(i);
  }
  return runs;
}

std::int64_t length(const std::vector<std::int32_t>& v) {
  return static_cast<std::int64_t>(v.size());
}

/// How many first tokens all texts of a request have in common, at most all rows of the shortest.
std::int64_t common_rows(const ChoiceRequest& r) {
  const auto& first = r.texts.front().tokens;
  std::int64_t n = length(first) - 1;
  for (const ScoredText& t : r.texts) {
    n = std::min(n, length(t.tokens) - 1);
    const auto differ = std::mismatch(first.begin(), first.begin() + n, t.tokens.begin());
    n = differ.first - first.begin();
  }
  return n;
}

std::vector<float> log_softmax(const std::vector<float>& x) {
  double top = -INFINITY, sum = 0;
  for (const float v : x) top = std::max(top, static_cast<double>(v));
  for (const float v : x) sum += std::exp(static_cast<double>(v) - top);
  std::vector<float> y;
  for (const float v : x)
    y.push_back(static_cast<float>(static_cast<double>(v) - top - std::log(sum)));
  return y;
}

}  // namespace

Scorer::Scorer(Backend& ops, const Model& model, const Adapter* adapter, std::int64_t max_tokens,
               bool share_prefix)
    : ops_(ops), model_(model), max_tokens_(max_tokens), share_prefix_(share_prefix) {
  if (adapter == nullptr || adapter->spec().method == Method::base) return;
  adapter_ = std::make_unique<DeviceAdapter>(ops, model.config, adapter->spec(), 0,
                                             DeviceAdapter::Update::none);
  adapter_->upload(ops, adapter->numbers());
}
Scorer::~Scorer() = default;

void Scorer::check(const std::vector<std::int32_t>& tokens) const {
  require(!tokens.empty(), "score: an empty text");
  for (auto t : tokens)
    require(t >= 0 && t < model_.config.vocab, "score: token {} is outside the vocabulary of {}", t,
            model_.config.vocab);
}

/// The pass, taken anew (larger) when the batch does not fit.
Pass& Scorer::pass_for(const HostBatch& b) {
  const auto sequences = static_cast<std::int64_t>(b.sequences.size()) / 4,
             labels = static_cast<std::int64_t>(b.targets.size());
  tokens_ += b.rows();
  if (pass_ && b.rows() <= rows_ && sequences <= sequences_ && labels <= labels_) return *pass_;
  rows_ = std::max({rows_, b.rows(), max_tokens_});
  sequences_ = std::max(sequences_, sequences);
  labels_ = std::max({labels_, labels, std::min<std::int64_t>(rows_, 512)});
  HostBatch largest;
  largest.begin_part(0);
  largest.add_sequence(std::vector<std::int32_t>(static_cast<std::size_t>(rows_)), 0, 0);
  for (std::int64_t i = 1; i < sequences_; ++i) largest.add_sequence({}, 0, 0);
  for (std::int64_t i = 0; i < labels_; ++i)
    largest.add_label(static_cast<std::int32_t>(i % rows_), 0, 0);
  largest.end_part();
  pass_.reset();
  pass_ = std::make_unique<Pass>(ops_, model_, std::vector<DeviceAdapter*>{adapter_.get()}, largest,
                                 false, Recompute::none);
  return *pass_;
}

std::vector<std::vector<float>> Scorer::labels(std::span<const LabelRequest> requests) {
  std::vector<std::vector<float>> out(requests.size());
  const auto size = [&](std::size_t i) { return length(requests[i].prompt); };
  for (const LabelRequest& r : requests) {
    check(r.prompt);
    check(r.labels);
    require(length(r.prompt) <= model_.config.max_positions,
            "score: a prompt of {} tokens; the model takes {}", r.prompt.size(),
            model_.config.max_positions);
  }
  for (const auto& run : packed(longest_first(requests.size(), size), max_tokens_, size)) {
    HostBatch batch;
    std::set<std::int32_t> offered;
    batch.begin_part(0);
    for (const std::size_t i : run) {
      const auto begin = batch.add_sequence(requests[i].prompt, static_cast<std::int32_t>(i), 0);
      batch.add_label(begin + static_cast<std::int32_t>(size(i)) - 1, 0, 1);
      offered.insert(requests[i].labels.begin(), requests[i].labels.end());
    }
    batch.end_part();
    const std::vector<std::int32_t> columns(offered.begin(), offered.end());
    const std::vector<float> logits = pass_for(batch).label_logits(batch, columns);
    for (std::size_t m = 0; m < run.size(); ++m) {
      std::vector<float> own;
      for (const auto label : requests[run[m]].labels) {
        const auto at = static_cast<std::size_t>(
            std::lower_bound(columns.begin(), columns.end(), label) - columns.begin());
        own.push_back(logits[m * columns.size() + at]);
      }
      out[run[m]] = log_softmax(own);
    }
  }
  return out;
}

std::vector<std::vector<ChoiceScore>> Scorer::choices(std::span<const ChoiceRequest> requests) {
  std::vector<std::vector<ChoiceScore>> out(requests.size());
  for (const ChoiceRequest& r : requests) {
    require(!r.texts.empty(), "score: a request without texts");
    for (const ScoredText& t : r.texts) {
      check(t.tokens);
      require(t.scored_from >= 1 && t.scored_from < length(t.tokens),
              "score: {} tokens scored from {}; expected 1 to {}", t.tokens.size(), t.scored_from,
              length(t.tokens) - 1);
      require(length(t.tokens) - 1 <= model_.config.max_positions,
              "score: a request of {} tokens; the model takes {}", t.tokens.size() - 1,
              model_.config.max_positions);
    }
  }
  std::vector<std::int64_t> shared(requests.size()), rows(requests.size());
  for (std::size_t i = 0; i < requests.size(); ++i) {
    shared[i] = share_prefix_ ? common_rows(requests[i]) : 0;
    rows[i] = shared[i];
    for (const ScoredText& t : requests[i].texts) rows[i] += length(t.tokens) - 1 - shared[i];
  }
  const auto size = [&](std::size_t i) { return rows[i]; };
  for (const auto& run : packed(longest_first(requests.size(), size), max_tokens_, size)) {
    HostBatch batch;
    std::vector<std::pair<std::size_t, std::size_t>> owner;  // of each label: request, text
    batch.begin_part(0);
    for (const std::size_t i : run) {
      const auto sample = static_cast<std::int32_t>(i);
      const auto prefix = static_cast<std::int32_t>(shared[i]);
      const auto& first = requests[i].texts.front().tokens;
      // What the texts have in common runs once; each text sees it as a prefix and adds the rest,
      // all but its last token.
      const std::int32_t begin =
          prefix == 0 ? 0 : batch.add_sequence({first.begin(), first.begin() + prefix}, sample, 0);
      out[i].assign(requests[i].texts.size(), {0, true});
      for (std::size_t c = 0; c < requests[i].texts.size(); ++c) {
        const ScoredText& t = requests[i].texts[c];
        std::int32_t own = 0;
        if (length(t.tokens) - 1 > prefix)
          own = batch.add_sequence({t.tokens.begin() + prefix, t.tokens.end() - 1}, sample, 0,
                                   prefix, begin, prefix);
        for (std::int32_t j = t.scored_from; j < static_cast<std::int32_t>(t.tokens.size()); ++j) {
          const std::int32_t row = j - 1 < prefix ? begin + j - 1 : own + j - 1 - prefix;
          batch.add_label(row, t.tokens[static_cast<std::size_t>(j)], 1);
          owner.emplace_back(i, c);
        }
      }
    }
    batch.end_part();
    std::vector<float> log_prob, greedy;
    pass_for(batch).log_probs(batch, log_prob, greedy);
    for (std::size_t m = 0; m < owner.size(); ++m) {
      ChoiceScore& s = out[owner[m].first][owner[m].second];
      s.log_prob += static_cast<double>(log_prob[m]);
      s.greedy = s.greedy && greedy[m] > 0.5F;
    }
  }
  return out;
}

std::vector<float> Scorer::logits(const std::vector<std::int32_t>& tokens) {
  check(tokens);
  HostBatch batch;
  batch.begin_part(0);
  batch.add_sequence(tokens, 0, 0);
  batch.end_part();
  return pass_for(batch).logits(batch);
}

Scoring Scorer::scoring() {
  return {[this](std::span<const LabelRequest> r) { return labels(r); },
          [this](std::span<const ChoiceRequest> r) { return choices(r); }};
}

}  // namespace mixlora
