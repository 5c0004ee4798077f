// Tables of tests: every configuration against a reference, on the same questions.
#include <algorithm>
#include <set>

#include "engine/error.h"
#include "reports/paired.h"
#include "reports/report.h"

namespace mixlora {
namespace {

/// What the table is against: a method, each of whose configurations serves its own suites, or one
/// configuration (`method` null).
struct Reference {
  const Configuration* configuration = nullptr;
  const Kin* method = nullptr;
};

Reference reference_of(const std::vector<Configuration>& all, const std::vector<Kin>& methods,
                       const std::string& name) {
  Reference out;
  for (const Configuration& c : all)
    if (out.configuration == nullptr && (name.empty() ? !c.first().is_base() : c.label == name))
      out.configuration = &c;
  for (const Kin& m : methods) {
    const bool own =
        std::find(m.members.begin(), m.members.end(), out.configuration) != m.members.end();
    // Alone, a method has only its own configurations to be held against.
    if (methods.size() > 1 && (name.empty() ? own : m.label == name)) out.method = &m;
  }
  if (out.method != nullptr) out.configuration = out.method->members.front();
  if (out.configuration != nullptr || name.empty()) return out;
  std::string labels;
  std::set<std::string> said;
  const auto add = [&](const std::string& label) {
    if (said.insert(label).second) labels += (labels.empty() ? "\"" : ", \"") + label + "\"";
  };
  for (const Kin& m : methods) add(m.label);
  for (const Configuration& c : all) add(c.label);
  fail("no trial \"{}\" to compare with; expected one of {}", name, labels);
}

/// The suites of c beside the reference's configuration that scored them, one that was trained on
/// the same tasks where there is one.
std::vector<Match> matches_of(const Configuration& c, const Kin& reference, const Variant& v) {
  std::vector<Match> out;
  std::set<std::string> suites;
  for (const StudyTrial* t : c.trials)
    for (const StudyScore& s : t->scores)
      if (s.protocol == v.protocol && s.metric == v.metric) suites.insert(s.suite);
  for (const auto& suite : in_order(suites)) {
    const Configuration* best = nullptr;
    for (const Configuration* r : reference.members) {
      if (!summarise(*r, suite, v, 0.95)) continue;
      const bool alike = r->first().text("/train/tasks") == c.first().text("/train/tasks");
      if (best == nullptr ||
          (alike && best->first().text("/train/tasks") != c.first().text("/train/tasks")))
        best = r;
    }
    if (best != nullptr && best != &c) out.push_back({suite, best, &c});
  }
  return out;
}

void add_rows(Table& t, const std::string& label, const Comparison& comparison) {
  for (TableRow& row : paired_rows(comparison)) {
    row.cells.insert(row.cells.begin(), Cell(label));
    t.rows.push_back(std::move(row));
  }
}

/// A method's suites make one comparison, whether one training was asked them all or each its own.
void add_method(Table& t, const Kin& m, const Kin& reference, const Variant& v,
                const Certainty& certainty) {
  std::vector<std::vector<Match>> each;
  std::vector<Match> together;
  std::set<std::string> suites;
  bool once = true;  // no suite was asked of two of the method's configurations
  for (const Configuration* c : m.members) {
    each.push_back(matches_of(*c, reference, v));
    for (const Match& match : each.back()) {
      once = once && suites.insert(match.suite).second;
      together.push_back(match);
    }
  }
  if (!once) {
    for (std::size_t i = 0; i < each.size(); ++i)
      add_rows(t, m.members[i]->label, compare(each[i], v, certainty));
    return;
  }
  const auto order = in_order(suites);
  std::stable_sort(together.begin(), together.end(), [&](const Match& a, const Match& b) {
    return std::find(order.begin(), order.end(), a.suite) <
           std::find(order.begin(), order.end(), b.suite);
  });
  add_rows(t, m.label, compare(together, v, certainty));
}

}  // namespace

Tables paired_tables(const Study& study, const ReportOptions& options) {
  const auto all = configurations(study);
  const auto methods = kin_of(study, all);
  const Reference reference = reference_of(all, methods, options.reference);
  Tables out;
  if (reference.configuration == nullptr) return out;
  const bool several = reference.method != nullptr && reference.method->members.size() > 1;
  for (const Variant& v : variants(study)) {
    Table t;
    t.name = variant_name("paired", study, v);
    t.title = "Against " + (several ? reference.method->label + ", suite by suite"
                                    : reference.configuration->label);
    if (reference.method != nullptr)
      for (const Kin& m : methods) add_method(t, m, *reference.method, v, options.certainty);
    else
      for (const Configuration& c : all)
        if (&c != reference.configuration)
          add_rows(t, c.label, compare(*reference.configuration, c, v, options.certainty));
    t.columns = paired_columns();
    t.words = paired_words();
    t.columns.insert(t.columns.begin(), "trial");
    t.caption = protocol_text(all, v) + paired_caption(options.certainty);
    if (several)
      t.caption += fmt::format(
          " A suite's trials are tested against {} of the same suite; one comparison holds all "
          "suites of a trial.",
          reference.method->label);
    if (!t.rows.empty()) out.push_back(std::move(t));
  }
  return out;
}

}  // namespace mixlora
