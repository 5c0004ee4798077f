// The JSON form of a task.
#pragma once
#include <array>
#include <utility>

#include "engine/fields.h"
#include "suites/task.h"

namespace mixlora {

inline auto enum_names(LabelKind /*of*/) {
  return std::array<std::pair<LabelKind, const char*>, 2>{
      {{LabelKind::letters, "letters"}, {LabelKind::row, "row"}}};
}
inline auto enum_names(Cleaning /*of*/) {
  return std::array<std::pair<Cleaning, const char*>, 2>{
      {{Cleaning::none, "none"}, {Cleaning::hellaswag, "hellaswag"}}};
}
template <class V> void fields(V& v, Split& s) {
  v("name", s.name);
  v("file", s.file);
  v("rows", s.rows);
  v("sha256", s.sha256);
  v("edition", s.edition);
  v("config", s.config);
  v("official", s.official);
}
template <class V> void fields(V& v, LabelTokenTexts& s) {
  v("prompt", s.prompt);
  v("passage_prompt", s.passage_prompt);
  v("choice", s.choice);
  v("separator", s.separator);
  v("labels", s.labels);
  v("official", s.official);
}
template <class V> void fields(V& v, LoglikelihoodTexts& s) {
  v("task", s.task);
  v("context", s.context);
  v("continuation", s.continuation);
  v("delimiter", s.delimiter);
  v("cleaning", s.cleaning);
  v("metrics", s.metrics);
  v("headline", s.headline);
}
template <class V> void fields(V& v, Task& s) {
  v("name", s.name);
  v("aliases", s.aliases);
  v("column", s.column);
  v("version", s.version);
  v("about", s.about);
  v("licence", s.licence);
  v("folder", s.folder);
  v("starter", s.starter);
  v("choices", s.choices);
  v("splits", s.splits);
  v("train", s.train_split);
  v("test", s.test_split);
  v("few_shot", s.few_shot_split);
  v("label_token", s.label_token);
  v("loglikelihood", s.loglikelihood);
  v("source", s.source);
}

}  // namespace mixlora
