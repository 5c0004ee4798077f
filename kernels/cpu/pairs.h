// Pairs: the (row, slot) pairs of a run of rows, grouped by expert.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/backend.h"

namespace mixlora::cpu {

struct Pairs {
  struct Group {
    std::int64_t expert, begin, end;  // -1: the frozen projections alone; places in `row`
  };
  std::vector<Group> groups;            // by rising expert, none empty
  std::vector<std::int32_t> row, slot;  // of each place; rows rise within a group
  std::vector<std::int32_t> place;      // of (row - first row) * slots + slot; -1: empty slot
  std::int64_t slots = 1;

  std::int64_t place_of(std::int64_t row_in_run, std::int64_t k) const {
    return place[static_cast<std::size_t>(row_in_run * slots + k)];
  }
};

/// Rows [from, to). Empty slots (no expert, weight 0) are left out; without a table every row's one
/// slot is expert 0.
inline Pairs pairs_of(const Slots& s, std::int64_t from, std::int64_t to) {
  Pairs p;
  p.slots = s.expert ? s.count : 1;
  const std::int64_t experts = s.expert ? s.experts : 1;
  const auto expert = [&](std::int64_t i, std::int64_t k) -> std::int64_t {
    if (!s.expert) return 0;
    const std::int64_t e = s.expert.row<std::int32_t>(i)[k];
    return e < 0 && s.weight.row<float>(i)[k] == 0 ? -2 : e;
  };
  std::vector<std::int64_t> next(static_cast<std::size_t>(experts + 1));
  for (std::int64_t i = from; i < to; ++i)
    for (std::int64_t k = 0; k < p.slots; ++k)
      if (const auto e = expert(i, k); e >= -1) ++next[static_cast<std::size_t>(e + 1)];
  std::int64_t at = 0;
  for (std::int64_t e = -1; e < experts; ++e) {
    std::int64_t& count = next[static_cast<std::size_t>(e + 1)];
    if (count > 0) p.groups.push_back({e, at, at + count});
    at += count;
    count = at - count;
  }
  p.row.resize(static_cast<std::size_t>(at));
  p.slot.resize(static_cast<std::size_t>(at));
  p.place.assign(static_cast<std::size_t>((to - from) * p.slots), -1);
  for (std::int64_t i = from; i < to; ++i)
    for (std::int64_t k = 0; k < p.slots; ++k) {
      const auto e = expert(i, k);
      if (e < -1) continue;
      const std::int64_t own = next[static_cast<std::size_t>(e + 1)]++;
      p.row[static_cast<std::size_t>(own)] = static_cast<std::int32_t>(i);
      p.slot[static_cast<std::size_t>(own)] = static_cast<std::int32_t>(k);
      p.place[static_cast<std::size_t>((i - from) * p.slots + k)] = static_cast<std::int32_t>(own);
    }
  return p;
}

}  // namespace mixlora::cpu
