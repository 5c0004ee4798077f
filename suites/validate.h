// Validation: what a split holds, against what is on record about it.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "engine/tokenizer.h"
#include "suites/protocol.h"
#include "suites/task.h"

namespace mixlora {

/// SHA-256 over the rows' contexts, questions, choices and answers: the same for every file that
/// asks the same, whatever its ids and its compression.
std::string content_hash(const Dataset& data);

enum class HashState : std::uint8_t { same, differs, other_edition, not_on_record };
inline auto enum_names(HashState /*of*/) {
  return std::array<std::pair<HashState, const char*>, 4>{
      {{HashState::same, "same"},
       {HashState::differs, "differs"},
       {HashState::other_edition, "other edition"},
       {HashState::not_on_record, "not on record"}}};
}

struct SplitReport {
  std::int64_t rows = 0, expected = 0;  // expected: the official count; 0: not stated
  std::string hash;
  HashState hash_state = HashState::not_on_record;
  std::vector<double> gold;                  // share of right answers by place
  std::int64_t repeated = 0;                 // rows that ask what an earlier one asks
  std::int64_t longest = 0, over_limit = 0;  // tokens of label-token prompts; 0: not counted

  bool good() const {
    return (expected == 0 || rows == expected) && hash_state != HashState::differs;
  }
  double majority() const;
};

/// Hash and count of rows against a split's record; a record of another edition's text is met or
/// tells nothing.
HashState compare_hash(const Split& split, const std::string& hash);
/// `tokenizer` may be null: prompts are not counted then. `limit`: tokens of a prompt.
SplitReport validate_split(const Task& task, const Split& split, const Tokenizer* tokenizer,
                           std::int64_t limit);
/// Rows of `test` that `train` asks too.
std::int64_t overlap(const Dataset& train, const Dataset& test);

}  // namespace mixlora
