// profile: where chosen training steps spend their time, by op family, phase, layer and operation;
// from time marks on the device's queue, without a profiler, or with one that waits for the steps.
#include <algorithm>
#include <map>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/model.h"
#include "experiments/commands/commands.h"
#include "experiments/commands/workload.h"
#include "experiments/plan.h"
#include "experiments/timing.h"
#include "kernels/timed_backend.h"
#include "reports/report.h"

namespace mixlora {
namespace {

struct ProfileArguments {
  WorkloadOptions work;
  std::string sweep, method = "mixlora", device = "auto", precision = "auto", recompute = "auto",
                     format = "terminal", out;
  std::vector<std::string> trials;
  std::int64_t warmup = 2, steps = 4;
  bool window = false;
};

/// What is trained, and where.
struct Subject {
  std::string name, model;
  RunSpec run;
  std::vector<TrainJob> jobs;
  std::unique_ptr<TimedBackend> ops;
};

std::string trial_list(const Sweep& sweep) {
  std::string out;
  for (const Trial& t : sweep.trials)
    if (t.spec.adapter.method != Method::base) out += fmt::format("\n  {}  {}", t.key, t.label);
  return out;
}

/// By label, or by the beginning of a key.
const Trial& find_trial(const Sweep& sweep, const std::string& name) {
  const Trial* found = nullptr;
  for (const Trial& t : sweep.trials) {
    if (t.label != name && (name.empty() || !t.key.starts_with(name))) continue;
    require(found == nullptr,
            "--trial \"{}\": more than one trial of {} is meant; expected one of{}", name,
            sweep.file, trial_list(sweep));
    found = &t;
  }
  require(
      found != nullptr,
      "--trial \"{}\": no trial of {} has this label or a key that begins so; expected one of{}",
      name, sweep.file, trial_list(sweep));
  require(found->spec.adapter.method != Method::base,
          "--trial \"{}\": the base model is not trained; expected one of{}", name,
          trial_list(sweep));
  return *found;
}

Subject of_sweep(const ProfileArguments& o) {
  Sweep sweep = read_sweep(o.sweep);
  Subject s;
  s.run = sweep.run;
  s.model = sweep.trials.front().spec.model;
  s.ops = make_timed_backend(s.run);
  set_keys(sweep, *s.ops);
  std::vector<std::string> names = o.trials;
  if (names.empty()) {
    for (const Trial& t : sweep.trials)
      if (t.spec.adapter.method != Method::base) names.push_back(t.label);
    require(names.size() == 1, "{}: name the trial to profile with --trial; expected one of{}",
            o.sweep, trial_list(sweep));
  }
  const auto tokenizer = tokenizer_of(s.model);
  Texts texts(tokenizer.get());
  for (const std::string& name : names) {
    const Trial& t = find_trial(sweep, name);
    s.jobs.push_back({t.spec.adapter, t.spec.train, texts.training(t.spec)});
    s.name += (s.name.empty() ? "" : " + ") + t.label;
  }
  s.name = fmt::format("{} of {}", s.name, sweep.name);
  return s;
}

Subject of_options(const ProfileArguments& o) {
  Subject s;
  read(Json(o.device), s.run.device, "--device");
  read(Json(o.precision), s.run.precision, "--precision");
  read(Json(o.recompute), s.run.recompute, "--recompute");
  s.model = o.work.model;
  s.ops = make_timed_backend(s.run);
  const Workload w = make_workload(o.work, config_of(s.model), o.warmup + o.steps, 0);
  s.jobs = jobs_of(o.method, w.job, o.work);
  for (const TrainJob& j : s.jobs)
    require(j.adapter.method != Method::base, "--method base: the base model is not trained");
  s.name = fmt::format("{}, {}, {}", o.method, s.model, w.name);
  return s;
}

/// The chosen steps, first as they are, then with marks.
struct Profile {
  std::vector<TimedStep> steps;
  double wall = 0, tokens = 0;  // of a mean step without marks: seconds; all adapters' tokens
  Recompute recompute = Recompute::none;
};

Profile take(Subject& s, const Model& model, std::int64_t warmup, std::int64_t steps, bool window) {
  Profile p;
  for (TrainJob& j : s.jobs) {
    j.train.max_steps = warmup + steps;
    j.train.num_epochs = static_cast<double>(warmup + steps);  // an epoch has a step at least
  }
  TrainOptions options;
  options.recompute = s.run.recompute;
  options.memory_limit = s.run.memory_limit_bytes();
  const auto job_count = static_cast<std::int64_t>(s.jobs.size());
  const auto pass = [&](const std::function<void(bool)>& choose) {
    p.wall = p.tokens = 0;
    if (warmup == 0) choose(true);
    TrainObserver observer;
    observer.on_step = [&](const StepRecord& r) {
      if (r.step > warmup) {
        p.tokens += static_cast<double>(r.tokens) / static_cast<double>(steps);
        if (r.job == 0) p.wall += r.ms / 1000 / static_cast<double>(steps);
      }
      if (r.job + 1 != job_count) return;
      if (r.step == warmup) choose(true);
      if (r.step == warmup + steps) choose(false);
    };
    p.recompute = train(*s.ops, model, s.jobs, options, observer).recompute;
  };
  if (window) {
    pass([&](bool on) { s.ops->profiler_window(on); });
    return p;
  }
  pass([&](bool on) { s.ops->measure(on); });
  p.steps = s.ops->steps();
  pass([](bool) {});  // the wall time without marks, of the same steps
  return p;
}

/// Sums over some of the calls, a mean step of them.
struct Sum {
  double calls = 0, seconds = 0, host = 0;
  std::array<double, kPhases> by_phase{};
  std::array<double, kFamilies> by_family{};
  void add(const TimedCall& c, double share) {
    calls += share;
    seconds += share * c.seconds;
    host += share * c.host;
    by_phase.at(static_cast<std::size_t>(c.phase)) += share * c.seconds;
    by_family.at(static_cast<std::size_t>(c.family)) += share * c.seconds;
  }
};
struct Sums {
  Sum all;
  std::array<Sum, kFamilies> families;
  std::map<std::int64_t, Sum> layers;  // -1: outside
  std::map<std::pair<std::string, Family>, Sum> ops;
  double device = 0, wall = 0, waits = 0;
};

Sums sums_of(const std::vector<TimedStep>& steps) {
  Sums s;
  const double share = 1 / static_cast<double>(steps.size());
  for (const TimedStep& step : steps) {
    s.device += share * step.seconds;
    s.wall += share * step.wall;
    for (const TimedCall& c : step.calls) {
      s.all.add(c, share);
      s.families.at(static_cast<std::size_t>(c.family)).add(c, share);
      s.layers[c.layer].add(c, share);
      s.ops[{c.op, c.family}].add(c, share);
      if (std::string_view(c.op) == "download") s.waits += share;
    }
  }
  return s;
}

Cell milliseconds(double seconds) {
  return {fmt::format("{:.2f}", 1000 * seconds), 1000 * seconds};
}
Cell number(double v, int digits) { return {fmt::format("{:.{}f}", v, digits), v}; }

/// Places of those that are not zero.
template <std::size_t N> std::vector<std::size_t> present(const std::array<double, N>& times) {
  std::vector<std::size_t> out;
  for (std::size_t i = 0; i < N; ++i)
    if (times.at(i) > 0) out.push_back(i);
  return out;
}

Table summary_table(const Subject& subject, const Profile& p, const Sums& s) {
  Table t{
      "profile",
      fmt::format("{}, on {}", subject.name, subject.ops->description()),
      fmt::format("Means of {} steps{}. A mark stands before and behind every call; what they cost "
                  "is in all times by parts, and is the difference of the two wall times of the "
                  "same steps.",
                  p.steps.size(),
                  p.recompute == Recompute::none
                      ? ""
                      : ", recompute " + write(p.recompute).get<std::string>()),
      {"a step", "value", "unit"},
      {}};
  const auto row = [&](const char* what, double value, int digits, const char* unit) {
    t.rows.push_back({Cell(what), number(value, digits), Cell(unit)});
  };
  row("tokens", p.tokens, 0, "1");
  row("wall time without marks", 1000 * p.wall, 2, "ms");
  row("wall time with marks", 1000 * s.wall, 2, "ms");
  row("marks cost", 100 * (s.wall / p.wall - 1), 1, "%");
  row("device, first mark to last", 1000 * s.device, 2, "ms");
  row("in calls", 1000 * s.all.seconds, 2, "ms");
  row("between calls", 1000 * (s.device - s.all.seconds), 2, "ms");
  row("host inside calls", 1000 * s.all.host, 2, "ms");
  row("calls", s.all.calls, 0, "1");
  row("waits of the host (downloads)", s.waits, 0, "1");
  return t;
}

Table family_table(const Sums& s) {
  const auto phases = present(s.all.by_phase);
  Table t{"families",
          "Time by op family, ms a step",
          "Host: time until the host could go on, waiting in downloads included.",
          {"op family", "calls"},
          {}};
  for (const std::size_t p : phases) t.columns.emplace_back(name_of(static_cast<Phase>(p)));
  for (const char* c : {"total", "share %", "host"}) t.columns.emplace_back(c);
  const auto row = [&](const std::string& name, const Sum& sum, double total) {
    std::vector<Cell> cells{name, number(sum.calls, 0)};
    for (const std::size_t p : phases) cells.push_back(milliseconds(sum.by_phase.at(p)));
    cells.push_back(milliseconds(total));
    cells.push_back(number(100 * total / s.device, 1));
    cells.push_back(milliseconds(sum.host));
    t.rows.emplace_back(std::move(cells));
  };
  std::vector<std::size_t> order;
  for (std::size_t f = 0; f < kFamilies; ++f)
    if (s.families.at(f).calls > 0) order.push_back(f);
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return s.families.at(a).seconds > s.families.at(b).seconds;
  });
  for (const std::size_t f : order)
    row(name_of(static_cast<Family>(f)), s.families.at(f), s.families.at(f).seconds);
  std::vector<Cell> gap(t.columns.size(), Cell("-"));
  gap[0] = "between calls";
  gap[gap.size() - 3] = milliseconds(s.device - s.all.seconds);
  gap[gap.size() - 2] = number(100 * (1 - s.all.seconds / s.device), 1);
  t.rows.emplace_back(std::move(gap));
  row("the step", s.all, s.device);
  return t;
}

Table layer_table(const Sums& s) {
  Sum inside;
  for (const auto& [layer, sum] : s.layers) {
    if (layer < 0) continue;
    for (std::size_t p = 0; p < kPhases; ++p) inside.by_phase.at(p) += sum.by_phase.at(p);
    for (std::size_t f = 0; f < kFamilies; ++f) inside.by_family.at(f) += sum.by_family.at(f);
  }
  const auto phases = present(inside.by_phase), families = present(inside.by_family);
  Table t{"layers", "Time by layer, ms a step", "", {"layer"}, {}};
  for (const std::size_t p : phases) t.columns.emplace_back(name_of(static_cast<Phase>(p)));
  t.columns.emplace_back("total");
  for (const std::size_t f : families) t.columns.emplace_back(name_of(static_cast<Family>(f)));
  const auto row = [&](const std::string& name, const Sum& sum) {
    std::vector<Cell> cells{name};
    for (const std::size_t p : phases) cells.push_back(milliseconds(sum.by_phase.at(p)));
    cells.push_back(milliseconds(sum.seconds));
    for (const std::size_t f : families) cells.push_back(milliseconds(sum.by_family.at(f)));
    t.rows.emplace_back(std::move(cells));
  };
  for (const auto& [layer, sum] : s.layers)
    if (layer >= 0) row(std::to_string(layer), sum);
  if (const auto outside = s.layers.find(-1); outside != s.layers.end())
    row("outside", outside->second);
  return t;
}

Table op_table(const Sums& s) {
  Table t{
      "ops", "Time by operation, a step",
      "",    {"operation", "op family", "calls", "ms", "share %", "us a call", "host us a call"},
      {},    {1}};
  std::vector<std::pair<std::pair<std::string, Family>, Sum>> rows(s.ops.begin(), s.ops.end());
  std::sort(rows.begin(), rows.end(),
            [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  for (const auto& [op, sum] : rows)
    t.rows.push_back({op.first, name_of(op.second), number(sum.calls, 0), milliseconds(sum.seconds),
                      number(100 * sum.seconds / s.device, 1),
                      number(1e6 * sum.seconds / sum.calls, 1),
                      number(1e6 * sum.host / sum.calls, 1)});
  return t;
}

int profile(const ProfileArguments& o) {
  const Format format = format_named(o.format);
  Subject subject = o.sweep.empty() ? of_options(o) : of_sweep(o);
  require(!o.window || subject.ops->device() == Device::cuda,
          "--window: expected a CUDA device, which profilers watch; this is {}",
          subject.ops->description());
  const auto model = Model::load(*subject.ops, subject.model);
  const Profile p = take(subject, *model, o.warmup, o.steps, o.window);
  if (o.window) {
    fmt::print("{}: steps {} to {} were shown to the profiler; {:.0f} tokens, {:.2f} ms a step\n",
               subject.name, o.warmup + 1, o.warmup + o.steps, p.tokens, 1000 * p.wall);
    return kDone;
  }
  require(!p.steps.empty(), "profile: no step was taken");
  const Sums sums = sums_of(p.steps);
  const std::vector<Table> tables{summary_table(subject, p, sums), family_table(sums),
                                  layer_table(sums), op_table(sums)};
  if (format == Format::json) {
    Json all = Json::array();
    for (const Table& t : tables) all.push_back(to_json(t));
    fmt::print("{}\n", all.dump(1));
  } else {
    for (const Table& t : tables) fmt::print("{}\n", render(t, format));
  }
  if (!o.out.empty())
    for (const Table& t : tables) write_table(t, o.out);
  return kDone;
}

}  // namespace

void add_profile_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<ProfileArguments>();  // the parser and the callback share it
  CLI::App* c = app.add_subcommand("profile", "say where training steps spend their time");
  c->add_option("sweep", o->sweep, "sweep file (JSON); without one, as bench's options say");
  CLI::Option* trials = c->add_option(
      "--trial", o->trials,
      "label of the sweep's trial, or the beginning of its key; several: in one step");
  add_workload_options(*c, o->work);
  c->add_option("--method", o->method, "lora, dora, mixlora, mixdora; mixlora+lora: in one step");
  c->add_option("--device", o->device, "auto, cpu, cuda");
  c->add_option("--precision", o->precision, "auto, fp32, bf16");
  c->add_option("--recompute", o->recompute, "none, gate-up, layer; auto: the least that fits");
  c->add_option("--warmup", o->warmup, "steps before the chosen ones")
      ->check(CLI::NonNegativeNumber);
  c->add_option("--steps", o->steps, "chosen steps")->check(CLI::PositiveNumber);
  c->add_option("--format", o->format, "terminal, markdown, csv, latex, json");
  c->add_option("--out", o->out, "folder for the tables as .md, .csv, .tex and .json");
  c->add_flag("--window", o->window,
              "time nothing; open a waiting profiler's window around the chosen steps");
  c->callback([=, &exit_code] {
    for (const char* own : {"--model", "--tokenizer", "--shape", "--task", "--batch-size", "--rank",
                            "--adapter", "--method", "--device", "--precision", "--recompute"})
      require(o->sweep.empty() || c->get_option(own)->count() == 0,
              "{}: the sweep file says this; it is for profiling without one", own);
    require(!o->sweep.empty() || trials->count() == 0, "--trial: expected a sweep file before it");
    exit_code = profile(*o);
  });
}

}  // namespace mixlora
