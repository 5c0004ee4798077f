// bench: steps of every method on real batches, timed: tokens a second, peak bytes, scoring.
#include <algorithm>
#include <fstream>
#include <random>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/batch.h"
#include "engine/error.h"
#include "engine/scorer.h"
#include "experiments/commands/commands.h"
#include "experiments/commands/workload.h"
#include "experiments/timing.h"
#include "reports/report.h"

namespace mixlora {
namespace {

struct BenchArguments {
  WorkloadOptions work;
  std::string device = "auto", precision = "auto", recompute = "none", format = "terminal", out,
              batches;
  std::vector<std::string> methods{"lora", "dora", "mixlora", "mixdora"};
  std::int64_t steps = 8, rows = 128, score_tokens = 1024;
  std::optional<double> memory_limit_gib;
};

/// The figures of one method, or of several adapters in one step.
struct Figures {
  bool fits = true;
  double ms_per_token = 0, ms = 0, tokens = 0;  // of a step; tokens of all its adapters
  Recompute recompute = Recompute::none;
  std::size_t planned = 0, measured = 0, device = 0;
  double score_tokens_per_s = 0;
};

/// Of the rows, the shares that the last layer's products take.
struct LastRows {
  double o = 1, feed_forward = 1;
};
/// The large products of a step and nothing else: the floor of a method. `down_rows` is what the
/// down projection takes: the rows, once, or once a slot for MixDoRA.
class ProductsOnly {
 public:
  ProductsOnly(Backend& ops, const Model& model, std::int64_t rows, std::int64_t labels,
               std::int64_t down_rows, LastRows trained, LastRows scored)
      : ops_(ops),
        model_(model),
        rows_(rows),
        labels_(labels),
        down_rows_(down_rows),
        trained_(trained),
        scored_(scored),
        arena_("products") {
    const ModelConfig& c = model.config;
    const DType type = ops.activation_type();
    const std::int64_t widest = std::max({c.qkv_width(), 2 * c.ffn, c.hidden});
    arena_.declare("x", x_, {down_rows, widest}, type);
    arena_.declare("y", y_, {down_rows, widest}, type);
    arena_.declare("h", h_, {kChunk, c.hidden}, type);
    arena_.declare("logits", logits_, {kChunk, c.vocab}, type);
    arena_.commit(ops);
    fill(x_);
    fill(h_);
  }
  /// Multiply-adds of one step, times two.
  double flops() const {
    double n = 0;
    for (std::size_t i = 0; i < model_.layers.size(); ++i)
      each(i, trained_, [&](const FrozenMatrix& w, std::int64_t rows, bool first) {
        n += static_cast<double>(w.out * w.in * rows) * (i == 0 && first ? 2 : 4);
      });
    return n + 4.0 * static_cast<double>(model_.config.vocab * model_.config.hidden * labels_);
  }
  void forward() { all_layers(true, scored_); }
  void step() {
    all_layers(true, trained_);
    for (std::int64_t at = 0; at < labels_; at += kChunk) {
      const std::int64_t m = std::min(kChunk, labels_ - at);
      ops_.linear(logits_.row_range(0, m), h_.row_range(0, m), model_.head);
      ops_.linear_backward(narrow(y_, m, model_.config.hidden), logits_.row_range(0, m),
                           model_.head, false);
    }
    all_layers(false, trained_);
  }

 private:
  static constexpr std::int64_t kChunk = 640;
  template <class F> void each(std::size_t i, LastRows last, F&& f) const {
    const LayerWeights& l = model_.layers[i];
    const auto taken = [&](std::int64_t rows, double share) {
      return i + 1 < model_.layers.size() ? rows : std::llround(share * static_cast<double>(rows));
    };
    f(l.qkv, rows_, true);
    f(l.o, taken(rows_, last.o), false);
    f(l.gate_up, taken(rows_, last.feed_forward), false);
    f(l.down, taken(down_rows_, last.feed_forward), false);
  }
  static Tensor narrow(Tensor t, std::int64_t rows, std::int64_t columns) {
    t.shape = Shape{rows, columns};
    t.stride = columns;
    return t;
  }
  void all_layers(bool forward, LastRows last) {
    for (std::size_t i = 0; i < model_.layers.size(); ++i)
      each(i, last, [&](const FrozenMatrix& w, std::int64_t rows, bool first) {
        if (forward)
          ops_.linear(narrow(y_, rows, w.out), narrow(x_, rows, w.in), w);
        else if (i > 0 || !first)
          ops_.linear_backward(narrow(y_, rows, w.in), narrow(x_, rows, w.out), w, false);
      });
  }
  /// Normal numbers, a million over and over, for zeros are not what a step multiplies: they cost
  /// less power, which is what bounds large products.
  void fill(Tensor t) {
    const std::int64_t most = std::min(t.rows(), std::max<std::int64_t>(1, (1 << 20) / t.cols()));
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    std::vector<float> numbers(static_cast<std::size_t>(most * t.cols()));
    for (float& x : numbers) x = normal(random);
    const std::vector<Bf16> halves(numbers.begin(), numbers.end());
    for (std::int64_t at = 0; at < t.rows(); at += most) {
      const Tensor rows = t.row_range(at, std::min(t.rows(), at + most));
      ops_.upload(rows, t.dtype == DType::bf16 ? static_cast<const void*>(halves.data())
                                               : static_cast<const void*>(numbers.data()));
    }
  }

  Backend& ops_;
  const Model& model_;
  std::int64_t rows_, labels_, down_rows_;
  LastRows trained_, scored_;
  Arena arena_;
  Tensor x_, y_, h_, logits_;
};

/// Median seconds of `times` calls after a first one.
template <class F> double median_seconds(Backend& ops, std::int64_t times, F&& f) {
  std::vector<double> all;
  for (std::int64_t i = 0; i <= times; ++i) {
    const auto start = Clock::now();
    f();
    ops.synchronize();
    if (i > 0) all.push_back(seconds_since(start));
  }
  return median(all);
}

Figures measure(Backend& ops, const Model& model, const BenchArguments& o, const RunSpec& run,
                const std::vector<TrainJob>& jobs, const std::vector<LabelRequest>& requests) {
  Figures f;
  std::unique_ptr<Adapter> adapter;
  if (jobs.front().adapter.method != Method::base) {
    TrainOptions options;
    options.recompute = run.recompute;
    options.memory_limit = run.memory_limit_bytes();
    std::vector<double> ms, tokens;  // by step, from the second: the first one warms up
    TrainObserver observer;
    observer.on_step = [&](const StepRecord& r) {
      f.device = std::max(f.device, ops.device_bytes());
      if (r.step == 1) return;
      ms.resize(static_cast<std::size_t>(r.step - 1), r.ms);
      tokens.resize(ms.size());
      tokens.back() += static_cast<double>(r.tokens);
    };
    TrainResult result = train(ops, model, jobs, options, observer);
    std::vector<double> each;
    for (std::size_t i = 0; i < ms.size(); ++i) {
      each.push_back(ms[i] / tokens[i]);
      f.tokens += tokens[i] / static_cast<double>(ms.size());
    }
    f.ms_per_token = median(each);
    f.ms = f.ms_per_token * f.tokens;
    f.planned = result.planned_bytes;
    f.measured = result.measured_bytes;
    f.recompute = result.recompute;
    adapter = std::move(result.adapters.front());
  }
  if (o.rows == 0) return f;
  Scorer scorer(ops, model, adapter.get(), o.score_tokens);
  scorer.labels(requests);
  const std::int64_t before = scorer.tokens();
  const auto start = Clock::now();
  scorer.labels(requests);
  f.score_tokens_per_s = static_cast<double>(scorer.tokens() - before) / seconds_since(start);
  return f;
}

/// Token ids of the batches that are trained, step by step, for a peer to be timed on the same.
void write_batches(const std::string& file, const TrainJob& job) {
  const SampleOrder order(job.train, job.items);
  nlohmann::json steps = nlohmann::json::array();
  for (std::int64_t s = 0; s < order.steps(); ++s) {
    nlohmann::json step = nlohmann::json::array();
    for (const auto& micro : order.micro_batches(s))
      for (auto i : micro) step.push_back(job.items[static_cast<std::size_t>(i)].tokens);
    steps.push_back(step);
  }
  std::ofstream out(file);
  out << nlohmann::json{{"steps", steps}} << '\n';
  require(out.good(), "bench: cannot write \"{}\"", file);
}

/// Rows of the down projection in a step of `tokens` tokens a job.
std::int64_t down_rows(const std::vector<TrainJob>& jobs, double tokens) {
  double rows = 0;
  for (const TrainJob& j : jobs) {
    const bool apart = has_router(j.adapter) && ffn_dora(j.adapter);
    rows += tokens * static_cast<double>(apart ? router_of(j.adapter).slots : 1);
  }
  return std::llround(rows);
}

/// Training's experts take the rows of its labels alone where most have none.
LastRows rows_trained(const Workload& work) {
  if (std::llround(work.labels) > most_selected(std::llround(work.tokens))) return {};
  return {1, work.labels / work.tokens};
}
/// A question's label is offered at its prompt's last row: what attention hands on.
LastRows rows_scored(const Workload& work) {
  double tokens = 0;
  for (const LabelRequest& r : work.requests) tokens += static_cast<double>(r.prompt.size());
  if (tokens == 0) return {};
  const double share = static_cast<double>(work.requests.size()) / tokens;
  return {share, share};
}

int bench(const BenchArguments& o) {
  const Format format = format_named(o.format);
  RunSpec run;
  read(Json(o.device), run.device, "--device");
  read(Json(o.precision), run.precision, "--precision");
  read(Json(o.recompute), run.recompute, "--recompute");
  run.memory_limit_gib = o.memory_limit_gib;
  const auto ops = make_backend(run);
  const Workload work = make_workload(o.work, config_of(o.work.model), o.steps, o.rows);
  const auto start = Clock::now();
  const auto model = Model::load(*ops, o.work.model);
  const double loaded = seconds_since(start);
  if (!o.batches.empty()) write_batches(o.batches, work.job);

  Table t{"bench",
          fmt::format("{}, {}, {:.0f} tokens a step and adapter, on {}", o.work.model, work.name,
                      work.tokens, ops->description()),
          fmt::format(
              "Share: of the method's products alone, the frozen matrices' forward and "
              "backward of the same step and nothing else, timed just before it; TFLOP/s "
              "counts these products. Medians of {} steps after the first. Device MiB: in use as "
              "the driver says, its own needs included. MiB each: "
              "measured, over the adapters in the step. The model was there after {:.1f} s.{}",
              work.steps - 1, loaded,
              o.memory_limit_gib ? fmt::format(" Memory limit: {} GiB ({:.1f} MiB).",
                                               *o.memory_limit_gib, 1024 * *o.memory_limit_gib)
                                 : ""),
          {"method", "tokens/s", "ms/step", "x first", "TFLOP/s", "products tokens/s", "share %",
           "recompute", "planned MiB", "measured MiB", "device MiB", "MiB each", "scoring tokens/s",
           "share %"},
          {}};
  double first = 0;
  for (const auto& method : o.methods) {
    const std::vector<TrainJob> jobs = jobs_of(method, work.job, o.work);
    const auto count = static_cast<double>(jobs.size());
    const bool trained = jobs.front().adapter.method != Method::base;
    double step_seconds = 0, forward_seconds = 0, flops = 0;
    const double product_tokens = work.tokens * count;
    {
      ProductsOnly products(*ops, *model, std::llround(product_tokens),
                            std::llround(work.labels * count), down_rows(jobs, work.tokens),
                            rows_trained(work), rows_scored(work));
      step_seconds = median_seconds(*ops, o.steps - 1, [&] { products.step(); });
      forward_seconds = median_seconds(*ops, o.steps - 1, [&] { products.forward(); });
      flops = products.flops();
    }
    Figures f;
    try {
      f = measure(*ops, *model, o, run, jobs, work.requests);
    } catch (const OutOfMemory& e) {
      fmt::print(stderr, "{}: {}\n", method, e.what());
      t.rows.push_back(TableRow{std::vector<Cell>(t.columns.size(), Cell("does not fit"))});
      t.rows.back().cells.front() = method;
      continue;
    }
    // The replay has the mean step's rows; a step's own share of it goes by tokens.
    const double products_ms = 1000 * step_seconds / product_tokens;
    if (first == 0) first = f.ms_per_token;
    const auto cell = [](bool there, double v, int digits) {
      return there ? Cell(fmt::format("{:.{}f}", v, digits), v) : Cell("-");
    };
    const auto mib = [](std::size_t bytes) {
      return bytes > 0 ? Cell(fmt::format("{:.1f}", static_cast<double>(bytes) / 1048576.0),
                              static_cast<double>(bytes) / 1048576.0)
                       : Cell("-");
    };
    t.rows.push_back(
        {method, cell(trained, 1000 / f.ms_per_token, 0), cell(trained, f.ms, 1),
         cell(trained && first > 0, f.ms_per_token / first, 3),
         cell(trained, flops / product_tokens / f.ms_per_token * 1e-9, 2),
         cell(trained, 1000 / products_ms, 0), cell(trained, 100 * products_ms / f.ms_per_token, 1),
         trained ? Cell(write(f.recompute).get<std::string>()) : Cell("-"), mib(f.planned),
         mib(f.measured), mib(f.device), mib(f.measured / jobs.size()),
         cell(o.rows > 0, f.score_tokens_per_s, 0),
         cell(o.rows > 0, 100 * f.score_tokens_per_s * forward_seconds / product_tokens, 1)});
  }
  fmt::print("{}", render(t, format));
  if (!o.out.empty()) write_table(t, o.out);
  return kDone;
}

}  // namespace

void add_bench_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<BenchArguments>();
  CLI::App* c = app.add_subcommand("bench", "time training steps and scoring of every method");
  add_workload_options(*c, o->work);
  c->add_option("--methods", o->methods,
                "base, lora, dora, mixlora, mixdora; mixlora+mixlora: two in one step")
      ->delimiter(',');
  c->add_option("--steps", o->steps, "training steps of each")->check(CLI::Range(2, 1000000));
  c->add_option("--rows", o->rows, "questions to score; 0: none")->check(CLI::NonNegativeNumber);
  c->add_option("--score-tokens", o->score_tokens, "tokens of one scoring pass")
      ->check(CLI::PositiveNumber);
  c->add_option("--device", o->device, "auto, cpu, cuda");
  c->add_option("--precision", o->precision, "auto, fp32, bf16");
  c->add_option("--recompute", o->recompute, "none, gate-up, layer; auto: the least that fits");
  c->add_option("--memory-limit", o->memory_limit_gib, "GiB that training may take")
      ->check(CLI::PositiveNumber);
  c->add_option("--format", o->format, "terminal, markdown, csv, latex, json");
  c->add_option("--out", o->out, "folder for the table as .md, .csv, .tex and .json");
  c->add_option("--batches", o->batches, "write the trained batches' token ids here (JSON)");
  c->callback([=, &exit_code] { exit_code = bench(*o); });
}

}  // namespace mixlora
