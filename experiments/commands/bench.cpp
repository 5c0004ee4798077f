// bench: steps of every method on real batches, timed: tokens a second, peak bytes, scoring.
#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/batch.h"
#include "engine/scorer.h"
#include "experiments/commands/commands.h"
#include "experiments/run_trial.h"
#include "kernels/timed_backend.h"
#include "reports/table.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string model = "models/smollm2-135m", task = "arc-e", device = "auto", precision = "auto",
              recompute = "none", format = "terminal", batches;
  std::vector<std::string> methods{"lora", "dora", "mixlora", "mixdora"};
  std::int64_t steps = 8, batch_size = 16, rank = 16, rows = 128;
  bool ops = false;
};

/// One method's figures.
struct Figures {
  double ms_per_token = 0, tokens_per_s = 0;
  std::size_t planned = 0, measured = 0;
  double score_tokens_per_s = 0;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}
double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  const std::size_t n = v.size();
  return n == 0 ? 0 : n % 2 == 1 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

AdapterSpec adapter_of(const std::string& method, std::int64_t rank) {
  nlohmann::json spec{{"method", method}, {"r", rank}, {"lora_alpha", 2 * rank}};
  AdapterSpec a;
  read(spec, a, "bench");
  return a;
}

/// The large products of the step that `batch` is, and nothing else: the floor of every method.
class ProductsOnly {
 public:
  ProductsOnly(Backend& ops, const Model& model, std::int64_t rows, std::int64_t labels)
      : ops_(ops), model_(model), rows_(rows), labels_(labels), arena_("products") {
    const ModelConfig& c = model.config;
    const DType type = ops.activation_type();
    const std::int64_t widest = std::max({c.qkv_width(), 2 * c.ffn, c.hidden});
    arena_.declare("x", x_, {rows, widest}, type);
    arena_.declare("y", y_, {rows, widest}, type);
    arena_.declare("h", h_, {kChunk, c.hidden}, type);
    arena_.declare("logits", logits_, {kChunk, c.vocab}, type);
    arena_.commit(ops);
  }
  /// Multiply-adds of one step, times two.
  double flops() const {
    double n = 0;
    for (std::size_t i = 0; i < model_.layers.size(); ++i)
      each(model_.layers[i], [&](const FrozenMatrix& w, bool first) {
        n += static_cast<double>(w.out * w.in * rows_) * (i == 0 && first ? 2 : 4);
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
  template <class F> static void each(const LayerWeights& l, F&& f) {
    f(l.qkv, true);
    f(l.o, false);
    f(l.gate_up, false);
    f(l.down, false);
  }
  Tensor narrow(Tensor t, std::int64_t columns) const {
    t.shape = Shape{rows_, columns};
    t.stride = columns;
    return t;
  }
  void all_layers(bool forward) {
    for (std::size_t i = 0; i < model_.layers.size(); ++i)
      each(model_.layers[i], [&](const FrozenMatrix& w, bool first) {
        if (forward)
          ops_.linear(narrow(y_, w.out), narrow(x_, w.in), w);
        else if (i > 0 || !first)
          ops_.linear_backward(narrow(x_, w.in), narrow(y_, w.out), w, false);
      });
  }

  Backend& ops_;
  const Model& model_;
  std::int64_t rows_, labels_;
  Arena arena_;
  Tensor x_, y_, h_, logits_;
};

template <class F> double best_seconds(Backend& ops, int times, F&& f) {
  double best = INFINITY;
  for (int i = 0; i <= times; ++i) {
    const auto start = Clock::now();
    f();
    ops.synchronize();
    if (i > 0) best = std::min(best, seconds_since(start));
  }
  return best;
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
  constexpr std::int64_t kTokens = 1024;
  Scorer scorer(ops, model, adapter.get(), kTokens);
  scorer.labels(std::span(requests).first(std::min<std::size_t>(requests.size(), 16)));
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

int bench(const Options& o) {
  RunSpec run;
  read(Json(o.device), run.device, "--device");
  read(Json(o.precision), run.precision, "--precision");
  const auto real = make_backend(run);
  TimedBackend timed(*real);
  Backend& ops = o.ops ? static_cast<Backend&>(timed) : *real;
  const Format format = o.format == "markdown" ? Format::markdown : Format::terminal;
  const auto model = Model::load(ops, o.model);
  const Tokenizer tokenizer(o.model);

  TrialSpec trial;
  trial.train.tasks = {o.task};
  trial.train.batch_size = o.batch_size;
  trial.train.max_steps = o.steps;
  TrainJob job{{}, trial.train, Texts(&tokenizer).training(trial)};
  if (!o.batches.empty()) write_batches(o.batches, job);
  const SampleOrder order(job.train, job.items);
  double tokens = 0, labels = 0;
  for (std::int64_t s = 0; s < order.steps(); ++s)
    for (const auto& micro : order.micro_batches(s))
      for (auto i : micro) {
        const TrainItem& item = job.items[static_cast<std::size_t>(i)];
        tokens += static_cast<double>(item.tokens.size());
        labels += static_cast<double>(label_count(item, job.train.train_on));
      }
  const auto steps = static_cast<double>(order.steps());
  const Task& task = find_task(o.task);
  Truncation cut;
  std::vector<LabelRequest> requests;
  for (const Row& row : load_split(task, false, o.rows).rows)
    requests.push_back(label_request(task, row, tokenizer, job.train.cutoff_len, cut));

  double step_seconds = 0, forward_seconds = 0, step_flops = 0;
  {
    ProductsOnly products(*real, *model, std::llround(tokens / steps),
                          std::llround(labels / steps));
    step_seconds = best_seconds(*real, 2, [&] { products.step(); });
    forward_seconds = best_seconds(*real, 2, [&] { products.forward(); });
    step_flops = products.flops();
  }
  const double floor_rate = tokens / steps / step_seconds,
               forward_rate = tokens / steps / forward_seconds;

  Table t{
      "bench",
      fmt::format("{}, {} tokens of {} a step, on {}", o.model, std::llround(tokens / steps),
                  o.task, ops.description()),
      fmt::format("Products alone, the frozen matrices' forward and backward of the same step "
                  "and nothing else: {:.0f} tokens/s training ({:.0f} GFLOP/s), {:.0f} scoring. "
                  "Share: of that. Median of {} steps after the first.",
                  floor_rate, step_flops / step_seconds * 1e-9, forward_rate, order.steps() - 1),
      {"method", "tokens/s", "ms/token", "x LoRA", "share %", "planned MiB", "measured MiB",
       "scoring tokens/s", "share %"},
      {}};
  double lora = 0;
  for (const auto& method : o.methods) {
    job.adapter = adapter_of(method, o.rank);
    const Figures f = measure(ops, *model, o, job, requests, [&](const char* phase) {
      if (o.ops) fmt::print("{}\n", render(op_table(method + ", " + phase, timed), format));
      timed.reset();
    });
    if (method == "lora") lora = f.ms_per_token;
    const bool trained = job.adapter.method != Method::base;
    const auto cell = [&](double v, int digits) {
      return trained ? fmt::format("{:.{}f}", v, digits) : std::string("-");
    };
    t.rows.push_back({method, cell(f.tokens_per_s, 0), cell(f.ms_per_token, 3),
                      lora > 0 ? cell(f.ms_per_token / lora, 2) : "-",
                      cell(100 * f.tokens_per_s / floor_rate, 0), mib(f.planned), mib(f.measured),
                      fmt::format("{:.0f}", f.score_tokens_per_s),
                      fmt::format("{:.0f}", 100 * f.score_tokens_per_s / forward_rate)});
  }
  fmt::print("{}", render(t, format));
  return kDone;
}

}  // namespace

void add_bench_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("bench", "time training steps and scoring of every method");
  c->add_option("--model", o->model, "Hugging Face directory");
  c->add_option("--task", o->task, "suite whose rows are trained and scored");
  c->add_option("--methods", o->methods, "base, lora, dora, mixlora, mixdora")->delimiter(',');
  c->add_option("--steps", o->steps, "training steps of each")->check(CLI::Range(2, 1000000));
  c->add_option("--batch-size", o->batch_size, "questions a step")->check(CLI::PositiveNumber);
  c->add_option("--rank", o->rank)->check(CLI::PositiveNumber);
  c->add_option("--rows", o->rows, "questions to score")->check(CLI::PositiveNumber);
  c->add_option("--device", o->device)->check(CLI::IsMember({"auto", "cpu", "cuda"}));
  c->add_option("--precision", o->precision)->check(CLI::IsMember({"auto", "fp32", "bf16"}));
  c->add_option("--recompute", o->recompute)->check(CLI::IsMember({"none", "gate-up", "layer"}));
  c->add_option("--format", o->format)->check(CLI::IsMember({"terminal", "markdown"}));
  c->add_option("--batches", o->batches, "write the trained batches' token ids here (JSON)");
  c->add_flag("--ops", o->ops, "print the time by operation");
  c->callback([=, &exit_code] { exit_code = bench(*o); });
}

}  // namespace mixlora
