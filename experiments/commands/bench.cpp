// bench: steps of every method on real batches, timed: tokens a second, peak bytes, scoring.
#include <algorithm>
#include <fstream>
#include <functional>
#include <sstream>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/batch.h"
#include "engine/scorer.h"
#include "experiments/commands/commands.h"
#include "experiments/run_trial.h"
#include "experiments/timing.h"
#include "kernels/timed_backend.h"
#include "reports/table.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

struct Options {
  std::string model = "models/smollm2-135m", tokenizer, task = "arc-e", shape, device = "auto",
              precision = "auto", recompute = "none", format = "terminal", batches;
  std::vector<std::string> methods{"lora", "dora", "mixlora", "mixdora"};
  std::int64_t steps = 8, batch_size = 16, rank = 16, rows = 128, score_tokens = 1024;
  bool ops = false;
};

/// One method's figures.
struct Figures {
  double ms_per_token = 0, tokens_per_s = 0;
  std::size_t planned = 0, measured = 0;
  double score_tokens_per_s = 0;
};

AdapterSpec adapter_of(const std::string& method, std::int64_t rank) {
  nlohmann::json spec{{"method", method}, {"r", rank}, {"lora_alpha", 2 * rank}};
  AdapterSpec a;
  read(spec, a, "bench");
  return a;
}

/// The large products of a step and nothing else: the floor of a method. `down` is how often the
/// down projection runs: once, or once a slot for MixDoRA.
class ProductsOnly {
 public:
  ProductsOnly(Backend& ops, const Model& model, std::int64_t rows, std::int64_t labels,
               std::int64_t down)
      : ops_(ops), model_(model), rows_(rows), labels_(labels), down_(down), arena_("products") {
    const ModelConfig& c = model.config;
    const DType type = ops.activation_type();
    const std::int64_t widest = std::max({c.qkv_width(), 2 * c.ffn, c.hidden});
    arena_.declare("x", x_, {down * rows, widest}, type);
    arena_.declare("y", y_, {down * rows, widest}, type);
    arena_.declare("h", h_, {kChunk, c.hidden}, type);
    arena_.declare("logits", logits_, {kChunk, c.vocab}, type);
    arena_.commit(ops);
  }
  /// Multiply-adds of one step, times two.
  double flops() const {
    double n = 0;
    for (std::size_t i = 0; i < model_.layers.size(); ++i)
      each(model_.layers[i], [&](const FrozenMatrix& w, std::int64_t rows, bool first) {
        n += static_cast<double>(w.out * w.in * rows) * (i == 0 && first ? 2 : 4);
      });
    return n + 4.0 * static_cast<double>(model_.config.vocab * model_.config.hidden * labels_);
  }
  void forward() { all_layers(true); }
  void step() {
    all_layers(true);
    for (std::int64_t at = 0; at < labels_; at += kChunk) {
      const std::int64_t m = std::min(kChunk, labels_ - at);
      ops_.linear(logits_.row_range(0, m), h_.row_range(0, m), model_.head);
      ops_.linear_backward(h_.row_range(0, m), logits_.row_range(0, m), model_.head, false);
    }
    all_layers(false);
  }

 private:
  static constexpr std::int64_t kChunk = 640;
  template <class F> void each(const LayerWeights& l, F&& f) const {
    f(l.qkv, rows_, true);
    f(l.o, rows_, false);
    f(l.gate_up, rows_, false);
    f(l.down, down_ * rows_, false);
  }
  static Tensor narrow(Tensor t, std::int64_t rows, std::int64_t columns) {
    t.shape = Shape{rows, columns};
    t.stride = columns;
    return t;
  }
  void all_layers(bool forward) {
    for (std::size_t i = 0; i < model_.layers.size(); ++i)
      each(model_.layers[i], [&](const FrozenMatrix& w, std::int64_t rows, bool first) {
        if (forward)
          ops_.linear(narrow(y_, rows, w.out), narrow(x_, rows, w.in), w);
        else if (i > 0 || !first)
          ops_.linear_backward(narrow(x_, rows, w.in), narrow(y_, rows, w.out), w, false);
      });
  }

  Backend& ops_;
  const Model& model_;
  std::int64_t rows_, labels_, down_;
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

Figures measure(Backend& ops, const Model& model, const Options& o, const TrainJob& job,
                const std::vector<LabelRequest>& requests,
                const std::function<void(const char*)>& phase_done) {
  Figures f;
  std::unique_ptr<Adapter> adapter;
  if (job.adapter.method != Method::base) {
    TrainOptions options;
    options.recompute = o.recompute == "gate-up" ? Recompute::gate_up
                        : o.recompute == "layer" ? Recompute::layer
                                                 : Recompute::none;
    std::vector<double> ms;
    TrainObserver observer;
    observer.on_step = [&](const StepRecord& r) {
      if (r.step > 1) ms.push_back(r.ms / static_cast<double>(r.tokens));  // the first one warms up
    };
    TrainResult result = train(ops, model, {job}, options, observer);
    f.ms_per_token = median(ms);
    f.tokens_per_s = 1000 / f.ms_per_token;
    f.planned = result.planned_bytes;
    f.measured = result.measured_bytes;
    adapter = std::move(result.adapters.front());
    phase_done("training");
  }
  Scorer scorer(ops, model, adapter.get(), o.score_tokens);
  scorer.labels(requests);
  const std::int64_t before = scorer.tokens();
  const auto start = Clock::now();
  scorer.labels(requests);
  f.score_tokens_per_s = static_cast<double>(scorer.tokens() - before) / seconds_since(start);
  phase_done("scoring");
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

std::string mib(std::size_t bytes) {
  return bytes == 0 ? "-" : fmt::format("{:.1f}", static_cast<double>(bytes) / 1048576.0);
}

Table op_table(const std::string& what, const TimedBackend& timed) {
  Table t{"ops",
          "Time by operation: " + what,
          "Every call waited for.",
          {"operation", "calls", "ms", "share %"},
          {}};
  double total = 0;
  std::vector<std::pair<std::string, TimedBackend::Time>> rows(timed.times().begin(),
                                                               timed.times().end());
  for (const auto& [name, time] : rows) total += time.seconds;
  std::sort(rows.begin(), rows.end(),
            [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  for (const auto& [name, time] : rows)
    t.rows.push_back({name, std::to_string(time.calls), fmt::format("{:.1f}", 1000 * time.seconds),
                      fmt::format("{:.1f}", 100 * time.seconds / total)});
  return t;
}

/// What is trained and scored.
struct Workload {
  std::string name;
  TrainJob job;
  std::vector<LabelRequest> requests;
  double tokens = 0, labels = 0;  // of a mean step
  std::int64_t steps = 0;
};

/// "8x512": so many sequences of so many random tokens a step.
Workload random_workload(const Options& o, const ModelConfig& config) {
  Workload w;
  std::int64_t count = 0, length = 0;
  char cross = 0;
  std::istringstream text(o.shape);
  text >> count >> cross >> length;
  require(text && text.eof() && cross == 'x' && count > 0 && length > 1,
          "bench: --shape \"{}\": expected SEQUENCESxTOKENS such as 8x512", o.shape);
  w.name = o.shape + " random";
  w.job.train.batch_size = count;
  w.job.train.cutoff_len = length;
  w.job.train.num_epochs = static_cast<double>(o.steps);
  const RandomKey key = random_key(1, Purpose::test);
  const auto draw = [&](std::int64_t i, std::int64_t j) {
    return static_cast<std::int32_t>(
        philox(static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(j), 0, 0, key.k0, key.k1)
            .v[0] %
        static_cast<std::uint32_t>(config.vocab));
  };
  for (std::int64_t i = 0; i < count; ++i) {
    TrainItem item;
    for (std::int64_t j = 0; j < length; ++j) item.tokens.push_back(draw(i, j));
    w.job.items.push_back(std::move(item));
  }
  for (std::int64_t i = 0; i < std::max<std::int64_t>(o.rows, 1); ++i) {
    LabelRequest r;
    for (std::int64_t j = 0; j < length; ++j) r.prompt.push_back(draw(i, j));
    for (std::int32_t label = 0; label < 4; ++label) r.labels.push_back(label);
    w.requests.push_back(std::move(r));
  }
  return w;
}

/// A suite's own rows, by `tokenizer`; ids past a shape's vocabulary wrap around.
Workload real_workload(const Options& o, const ModelConfig& config) {
  Workload w;
  const std::string source = o.tokenizer.empty() ? o.model : o.tokenizer;
  const Tokenizer tokenizer(source);
  TrialSpec trial;
  trial.train.tasks = {o.task};
  w.name = fmt::format("{} questions of {}", o.batch_size, o.task);
  w.job.items = Texts(&tokenizer).training(trial);
  w.job.train.batch_size = o.batch_size;
  const Task& task = find_task(o.task);
  Truncation cut;
  for (const Row& row : load_split(task, false, o.rows).rows)
    w.requests.push_back(label_request(task, row, tokenizer, w.job.train.cutoff_len, cut));
  const auto wrap = [&](std::vector<std::int32_t>& ids) {
    for (auto& id : ids) id %= static_cast<std::int32_t>(config.vocab);
  };
  for (TrainItem& item : w.job.items) wrap(item.tokens);
  for (LabelRequest& r : w.requests) wrap(r.prompt), wrap(r.labels);
  return w;
}

Workload workload(const Options& o, const ModelConfig& config) {
  Workload w = o.shape.empty() ? real_workload(o, config) : random_workload(o, config);
  w.job.train.max_steps = o.steps;
  const SampleOrder order(w.job.train, w.job.items);
  w.steps = order.steps();
  for (std::int64_t s = 0; s < order.steps(); ++s)
    for (const auto& micro : order.micro_batches(s))
      for (auto i : micro) {
        const TrainItem& item = w.job.items[static_cast<std::size_t>(i)];
        w.tokens += static_cast<double>(item.tokens.size()) / static_cast<double>(w.steps);
        w.labels += static_cast<double>(label_count(item, w.job.train.train_on)) /
                    static_cast<double>(w.steps);
      }
  return w;
}

int bench(const Options& o) {
  RunSpec run;
  read(Json(o.device), run.device, "--device");
  read(Json(o.precision), run.precision, "--precision");
  const auto real = make_backend(run);
  TimedBackend timed(*real);
  Backend& ops = o.ops ? static_cast<Backend&>(timed) : *real;
  const Format format = o.format == "markdown" ? Format::markdown : Format::terminal;
  const auto model = Model::load(ops, o.model);
  Workload work = workload(o, model->config);
  if (!o.batches.empty()) write_batches(o.batches, work.job);

  Table t{"bench",
          fmt::format("{}, {}, {:.0f} tokens a step, on {}", o.model, work.name, work.tokens,
                      ops.description()),
          fmt::format("Share: of the method's products alone, the frozen matrices' forward and "
                      "backward of the same step and nothing else, timed just before it; TFLOP/s "
                      "counts these products. Medians of {} steps after the first.",
                      work.steps - 1),
          {"method", "tokens/s", "ms/step", "x LoRA", "TFLOP/s", "products tokens/s", "share %",
           "planned MiB", "measured MiB", "scoring tokens/s", "share %"},
          {}};
  double lora = 0;
  for (const auto& method : o.methods) {
    work.job.adapter = adapter_of(method, o.rank);
    const bool trained = work.job.adapter.method != Method::base;
    double step_seconds = 0, forward_seconds = 0, flops = 0;
    {
      const bool apart = has_router(work.job.adapter) && ffn_dora(work.job.adapter);
      ProductsOnly products(*real, *model, std::llround(work.tokens), std::llround(work.labels),
                            apart ? router_of(work.job.adapter).slots : 1);
      step_seconds = median_seconds(*real, o.steps - 1, [&] { products.step(); });
      forward_seconds = median_seconds(*real, o.steps - 1, [&] { products.forward(); });
      flops = products.flops();
    }
    const Figures f = measure(ops, *model, o, work.job, work.requests, [&](const char* phase) {
      if (o.ops) fmt::print("{}\n", render(op_table(method + ", " + phase, timed), format));
      timed.reset();
    });

    const double ms = f.ms_per_token * work.tokens;
    if (method == "lora") lora = f.ms_per_token;
    const auto cell = [&](double v, int digits) {
      return trained ? fmt::format("{:.{}f}", v, digits) : std::string("-");
    };
    t.rows.push_back(
        {method, cell(f.tokens_per_s, 0), cell(ms, 1),
         lora > 0 ? cell(f.ms_per_token / lora, 3) : "-", cell(flops / ms * 1e-9, 2),
         cell(work.tokens / step_seconds, 0), cell(1e5 * step_seconds / ms, 1), mib(f.planned),
         mib(f.measured), fmt::format("{:.0f}", f.score_tokens_per_s),
         fmt::format("{:.1f}", 100 * f.score_tokens_per_s * forward_seconds / work.tokens)});
  }
  fmt::print("{}", render(t, format));
  return kDone;
}

}  // namespace

void add_bench_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("bench", "time training steps and scoring of every method");
  c->add_option("--model", o->model, "Hugging Face directory, or shape:llama-2-7b");
  c->add_option("--tokenizer", o->tokenizer, "directory whose tokenizer reads the task; --model's");
  c->add_option("--shape", o->shape, "random tokens instead of a task: 8x512, sequences by tokens");
  c->add_option("--task", o->task, "suite whose rows are trained and scored");
  c->add_option("--methods", o->methods, "base, lora, dora, mixlora, mixdora")->delimiter(',');
  c->add_option("--steps", o->steps, "training steps of each")->check(CLI::Range(2, 1000000));
  c->add_option("--batch-size", o->batch_size, "questions a step")->check(CLI::PositiveNumber);
  c->add_option("--rank", o->rank)->check(CLI::PositiveNumber);
  c->add_option("--rows", o->rows, "questions to score")->check(CLI::PositiveNumber);
  c->add_option("--score-tokens", o->score_tokens, "tokens of one scoring pass")
      ->check(CLI::PositiveNumber);
  c->add_option("--device", o->device)->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  c->add_option("--precision", o->precision)->check(CLI::IsMember({"auto", "fp32", "bf16"}));
  c->add_option("--recompute", o->recompute)->check(CLI::IsMember({"none", "gate-up", "layer"}));
  c->add_option("--format", o->format)->check(CLI::IsMember({"terminal", "markdown"}));
  c->add_option("--batches", o->batches, "write the trained batches' token ids here (JSON)");
  c->add_flag("--ops", o->ops, "print the time by operation");
  c->callback([=, &exit_code] { exit_code = bench(*o); });
}

}  // namespace mixlora
