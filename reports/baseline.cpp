#include "reports/baseline.h"

#include "engine/error.h"
#include "engine/json_file.h"
#include "reports/costs.h"

namespace mixlora {
namespace {

constexpr const char* kFormat = "mixlora-bench baseline 1";

std::vector<double> spread(const std::vector<double>& all) {
  if (all.size() <= kBaselineSteps) return all;
  std::vector<double> out;
  for (std::size_t i = 0; i < kBaselineSteps; ++i)
    out.push_back(all[i * all.size() / kBaselineSteps]);
  return out;
}

/// The value at a key, of the type asked for; `path` is what errors call the object.
template <class T> T at(const Json& j, const char* key, const std::string& path) {
  require(j.is_object() && j.contains(key),
          "{}: no \"{}\"; expected a file that check --update wrote", path, key);
  try {
    return j[key].get<T>();
  } catch (const Json::exception&) {
    fail("{}.{}: {} is not of the type expected there", path, key, j[key].dump().substr(0, 80));
  }
}

}  // namespace

Baseline baseline_of(const Study& study) {
  Baseline out;
  out.sweep = study.name;
  for (const StudyTrial& t : study.trials) {
    require(t.done(), "trial \"{}\" is {}: a baseline holds finished trials; run the sweep again",
            t.label, t.status);
    BaselineTrial& b = out.trials.emplace_back();
    b.label = t.label;
    b.device = t.device;
    b.processor = t.processor;
    b.spec = t.spec;
    b.ms_per_token = spread(step_times({t.label, {&t}}));
    b.peak_bytes = t.measured("measured_peak_bytes");
    for (const StudyScore& s : t.scores) {
      b.scores.push_back({s.suite, s.protocol, s.metric, s.bits, s.value, s.n, s.right});
      if (s.items.empty()) continue;
      const auto [known, fresh] = out.items.try_emplace(s.suite + "/" + s.protocol, s.items);
      require(fresh || known->second == s.items,
              "trial \"{}\": suite {} was asked other questions than in an earlier trial; a "
              "baseline needs one limit for all",
              t.label, s.suite);
    }
  }
  return out;
}

void write_baseline(const Baseline& baseline, const std::filesystem::path& file) {
  Json trials = Json::array();
  for (const BaselineTrial& t : baseline.trials) {
    Json scores = Json::array();
    for (const BaselineScore& s : t.scores) {
      std::string right;
      for (const double r : s.right) right += r > 0.5 ? '1' : '0';
      scores.push_back({{"suite", s.suite},
                        {"protocol", s.protocol},
                        {"metric", s.metric},
                        {"value", s.value},
                        {"n", s.n},
                        {"right", right},
                        {"bits", s.bits}});
    }
    trials.push_back({{"label", t.label},
                      {"device", t.device},
                      {"processor", t.processor},
                      {"spec", t.spec},
                      {"scores", scores},
                      {"ms_per_token", t.ms_per_token},
                      {"peak_bytes", t.peak_bytes ? Json(*t.peak_bytes) : Json(nullptr)}});
  }
  write_text(file, Json{{"format", kFormat},
                        {"sweep", baseline.sweep},
                        {"items", baseline.items},
                        {"trials", trials}}
                           .dump(1) +
                       "\n");
}

Baseline read_baseline(const std::filesystem::path& file) {
  const std::string name = file.string();
  require(std::filesystem::exists(file),
          "{}: no such baseline; mixlora-bench check --baseline {} --update DB writes it", name,
          name);
  const Json json = read_json(file);
  require(json.is_object() && json.value("format", Json()) == kFormat,
          "{}: not a baseline; expected a file that check --baseline FILE --update wrote", name);
  Baseline out;
  out.sweep = at<std::string>(json, "sweep", name);
  out.items = at<std::map<std::string, std::vector<std::string>>>(json, "items", name);
  const Json trials = at<Json>(json, "trials", name);
  for (std::size_t i = 0; i < trials.size(); ++i) {
    const std::string path = fmt::format("{}: trials[{}]", name, i);
    const Json& j = trials[i];
    BaselineTrial& t = out.trials.emplace_back();
    t.label = at<std::string>(j, "label", path);
    t.device = at<std::string>(j, "device", path);
    if (j.contains("processor")) t.processor = at<std::string>(j, "processor", path);
    t.spec = at<Json>(j, "spec", path);
    t.ms_per_token = at<std::vector<double>>(j, "ms_per_token", path);
    if (!at<Json>(j, "peak_bytes", path).is_null())
      t.peak_bytes = at<double>(j, "peak_bytes", path);
    for (const Json& s : at<Json>(j, "scores", path)) {
      BaselineScore& score = t.scores.emplace_back();
      score.suite = at<std::string>(s, "suite", path + ".scores");
      score.protocol = at<std::string>(s, "protocol", path + ".scores");
      score.metric = at<std::string>(s, "metric", path + ".scores");
      score.bits = at<std::string>(s, "bits", path + ".scores");
      score.value = at<double>(s, "value", path + ".scores");
      score.n = at<std::int64_t>(s, "n", path + ".scores");
      for (const char c : at<std::string>(s, "right", path + ".scores")) {
        require(c == '0' || c == '1', "{}.scores.right: '{}'; expected 0 and 1", path, c);
        score.right.push_back(c == '1' ? 1 : 0);
      }
      const auto items = out.items.find(score.suite + "/" + score.protocol);
      require(score.right.empty() ||
                  (items != out.items.end() && items->second.size() == score.right.size()),
              "{}.scores.right: {} outcomes for {} questions of {}", path, score.right.size(),
              items == out.items.end() ? 0 : items->second.size(), score.suite);
    }
  }
  return out;
}

}  // namespace mixlora
