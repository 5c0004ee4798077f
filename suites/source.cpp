#include "suites/source.h"

#include <algorithm>

#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/json_file.h"
#include "engine/utf8.h"

namespace mixlora {
namespace {

const Json& value_at(const Json& record, const std::string& column, const std::string& where) {
  const Json* at = &record;
  for (std::size_t from = 0; from <= column.size();) {
    const std::size_t end = std::min(column.find('.', from), column.size());
    const std::string key = column.substr(from, end - from);
    require(at->is_object() && at->contains(key), "{}: no \"{}\"", where, column);
    at = &(*at)[key];
    from = end + 1;
  }
  return *at;
}

std::string text_of(const Json& value, const std::string& column, const std::string& where) {
  if (value.is_number_integer()) return value.dump();
  require(value.is_string(), "{}: \"{}\": expected a text, found {}", where, column,
          value.type_name());
  const auto& text = value.get_ref<const std::string&>();
  require(!invalid_utf8(text), "{}: \"{}\": not valid UTF-8", where, column);
  return text;
}

std::vector<std::string> texts_of(const Json& value, const std::string& column,
                                  const std::string& where) {
  require(value.is_array(), "{}: \"{}\": expected a list, found {}", where, column,
          value.type_name());
  std::vector<std::string> out;
  for (const Json& v : value) out.push_back(text_of(v, column, where));
  return out;
}

std::int64_t answer_of(const Source& s, const Json& record, const std::string& where) {
  const std::string answer = text_of(value_at(record, s.answer, where), s.answer, where);
  if (!s.answer_among.empty()) {
    const auto labels = texts_of(value_at(record, s.answer_among, where), s.answer_among, where);
    const auto at = std::find(labels.begin(), labels.end(), answer);
    require(at != labels.end(), "{}: the answer \"{}\" is not among its labels", where,
            shown_text(answer));
    return at - labels.begin();
  }
  require(
      !answer.empty() && answer.size() < 10 &&
          answer.find_first_not_of("0123456789") == std::string::npos,
      "{}: \"{}\" is \"{}\"; expected the number of a choice (a split without answers has none)",
      where, s.answer, shown_text(answer));
  return std::stoll(answer) - s.first_answer;
}

}  // namespace

std::vector<std::string> columns_of(const Source& s) {
  std::vector<std::string> out = s.choices;
  for (const auto& column : {s.id, s.context, s.question, s.answer, s.answer_among})
    if (!column.empty()) out.push_back(column);
  return out;
}

Json row_of(const Source& s, const Json& record, const std::string& id, const std::string& where) {
  const auto text = [&](const std::string& column) {
    return column.empty() ? "" : text_of(value_at(record, column, where), column, where);
  };
  std::vector<std::string> choices = s.fixed_choices, labels = s.fixed_labels;
  if (s.choices.size() == 1)
    choices = texts_of(value_at(record, s.choices.front(), where), s.choices.front(), where);
  else
    for (const auto& column : s.choices) choices.push_back(text(column));
  require(choices.size() <= 26, "{}: {} choices", where, choices.size());
  if (labels.empty())
    for (std::size_t i = 0; i < choices.size(); ++i)
      labels.emplace_back(1, static_cast<char>('A' + i));
  const std::int64_t answer = answer_of(s, record, where);
  require(answer >= 0 && answer < static_cast<std::int64_t>(choices.size()),
          "{}: answer {} of {} choices", where, answer, choices.size());
  return {{"id", s.id.empty() ? id : text(s.id)},
          {"context", text(s.context)},
          {"question", text(s.question)},
          {"choices", choices},
          {"labels", labels},
          {"answer", answer}};
}

}  // namespace mixlora
