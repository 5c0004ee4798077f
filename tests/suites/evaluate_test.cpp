// Evaluation: from scores to answers, metrics and errors; batches and order do not matter.
#include "suites/evaluate.h"

#include <cmath>

#include "engine/scorer.h"
#include "suites/loglikelihood.h"
#include "suites/prompt.h"
#include "tests/suites/real_things.h"
#include "tests/suites/temporary.h"

using namespace mixlora;
using Catch::Matchers::ContainsSubstring;

namespace {

ProtocolSpec loglikelihood() {
  ProtocolSpec s;
  s.protocol = Protocol::loglikelihood;
  return s;
}

}  // namespace

TEST_CASE("metrics follow from the choices' log-probabilities", "[suites][evaluate]") {
  if (!has_model()) return;
  const Tokenizer tokenizer(real_model());
  Task task = find_task("arc-e");
  Dataset data;
  data.rows = {{"a", "", "q", {"yes", "no, never"}, {"A", "B"}, 1},
               {"b", "", "q", {"yes", "no, never"}, {"A", "B"}, 0},
               {"c", "", "q", {"tie", "eit"}, {"A", "B"}, 0}};
  const Scoring scoring{{}, [](std::span<const ChoiceRequest> r) {
                          std::vector<std::vector<ChoiceScore>> out;
                          for (std::size_t i = 0; i < r.size(); ++i) {
                            REQUIRE(r[i].texts.size() == 2);
                            out.push_back({{-6, false}, {i == 2 ? -6.0 : -9.0, false}});
                          }
                          return out;
                        }};
  const Evaluation e = evaluate(task, data, tokenizer, scoring, loglikelihood(), 0, 2048);
  CHECK(e.protocol == "loglikelihood");
  REQUIRE(e.others.size() == 2);
  CHECK(e.metric == "acc");
  CHECK(e.value == Approx(2.0 / 3));  // -6 against -9; the tie goes to the first
  CHECK(e.standard_error == Approx(std::sqrt(2.0 / 9 / 2)));
  CHECK(e.others[0].name == "acc_norm");
  CHECK(e.others[0].value == Approx(2.0 / 3));  // -6/3 against -9/9
  CHECK(e.majority == Approx(2.0 / 3));
  CHECK(e.chance == Approx(0.5));
  CHECK(e.answers[0].choice == 0);
  CHECK(e.answers[0].gold == 1);
  CHECK(e.answers[2].log_probs == std::vector<float>{-6, -6});
  task.loglikelihood.headline = "acc_norm";
  const Evaluation normed = evaluate(task, data, tokenizer, scoring, loglikelihood(), 0, 2048);
  CHECK(normed.metric == "acc_norm");
  CHECK(normed.answers[0].choice == 1);
}

TEST_CASE("a spec that means nothing is refused", "[suites][evaluate]") {
  ProtocolSpec s = loglikelihood();
  s.label_rule = LabelRule::official;
  CHECK_THAT(message_of([&] { check(s, "base.evaluate"); }),
             ContainsSubstring("base.evaluate.label_rule") && ContainsSubstring("label-token"));
  s = {};
  s.few_shot = 3;
  CHECK_THAT(message_of([&] { check(s, "x"); }), ContainsSubstring("x.few_shot"));
  s = loglikelihood();
  s.few_shot = -1;
  CHECK_THAT(message_of([&] { check(s, "x"); }), ContainsSubstring("x.few_shot: -1"));
}

// In float32 the same row gives the same bits wherever it stands in a batch, but the matrix
// product's blocking may depend on how many rows there are: sums then run in another order. 1e-4
// nats over a text is that rounding; a wrong prefix or position costs whole nats.
TEST_CASE("SmolLM2's scores depend neither on batches, order nor sharing", "[suites][evaluate]") {
  if (!has_model()) return;
  const Tokenizer tokenizer(real_model());
  const auto ops = make_cpu_backend(Precision::fp32);
  const auto model = Model::load(*ops, real_model());
  constexpr double kRounding = 1e-4;
  std::vector<ChoiceRequest> requests;
  std::vector<LabelRequest> labels;
  bool cut = false;
  for (const char* name : {"starter-question", "starter-blank"}) {
    const Task task = find_task(name);
    LabelRequests maker(task, tokenizer, {}, 512);
    for (const Row& row : load_split(task, false, 4).rows) {
      ChoiceRequest& r = requests.emplace_back();
      for (const TextPair& pair : choice_texts(task, row))
        r.texts.push_back(encode_pair(pair, tokenizer, Bos::automatic, 0, cut));
      labels.push_back(maker.request(row));
    }
  }
  Scorer large(*ops, *model, nullptr, 512), small(*ops, *model, nullptr, 8),
      apart(*ops, *model, nullptr, 64, false);
  const std::vector<ChoiceRequest> turned(requests.rbegin(), requests.rend());
  const std::vector<LabelRequest> labels_turned(labels.rbegin(), labels.rend());
  const auto a = large.choices(requests), b = small.choices(turned), c = apart.choices(requests);
  CHECK(large.tokens() < apart.tokens());
  const auto p = large.labels(labels), q = small.labels(labels_turned);
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t k = 0; k < a[i].size(); ++k) {
      most = std::max(most, std::abs(a[i][k].log_prob - b[a.size() - 1 - i][k].log_prob));
      most = std::max(most, std::abs(a[i][k].log_prob - c[i][k].log_prob));
    }
    for (std::size_t k = 0; k < p[i].size(); ++k)
      most = std::max(most, std::abs(static_cast<double>(p[i][k] - q[p.size() - 1 - i][k])));
  }
  CAPTURE(most);
  CHECK(most < kRounding);
}
