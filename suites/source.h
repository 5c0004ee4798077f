// Source: where a task's official rows are published, and how a record of theirs becomes a row.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace mixlora {

using Json = nlohmann::json;
struct Dataset;

/// Columns are named as in the official files; "choices.text" is a column inside a struct.
struct Source {
  std::string repository;  // data set on the Hugging Face Hub: "allenai/ai2_arc"; empty: none
  std::string config;      // its configuration; a split's own comes first
  std::string id;          // column; empty: ids are folder, split and place
  std::string context;     // column; empty: rows have none
  std::string question;    // column
  std::vector<std::string> choices;        // one column a choice, or one that holds the list
  std::vector<std::string> fixed_choices;  // the same for every row, instead
  std::vector<std::string> fixed_labels;   // the same for every row; empty: A, B, ...
  std::string answer;                      // column: a number, or a label of `answer_among`
  std::string answer_among;                // column that lists labels; empty: answer is a number
  std::int64_t first_answer = 0;           // the number that means the first choice
};
template <class V> void fields(V& v, Source& s) {
  v("repository", s.repository);
  v("config", s.config);
  v("id", s.id);
  v("context", s.context);
  v("question", s.question);
  v("choices", s.choices);
  v("fixed_choices", s.fixed_choices);
  v("fixed_labels", s.fixed_labels);
  v("answer", s.answer);
  v("answer_among", s.answer_among);
  v("first_answer", s.first_answer);
}

/// Every column that the rows are made of.
std::vector<std::string> columns_of(const Source& source);
/// A record as one of our rows; `id` is for sources without one, `where` is what errors call it.
Json row_of(const Source& source, const Json& record, const std::string& id,
            const std::string& where);

}  // namespace mixlora
