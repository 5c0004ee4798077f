// Training items of random tokens.
#pragma once
#include "engine/train.h"

namespace mixlora {

/// `n` items of 5 to 94 tokens below `vocab`, the second half of each the answer; always the same.
inline std::vector<TrainItem> random_items(int n, std::int64_t vocab) {
  std::vector<TrainItem> items(static_cast<std::size_t>(n));
  const RandomKey key = random_key(11, Purpose::test);
  for (int i = 0; i < n; ++i) {
    TrainItem& item = items[static_cast<std::size_t>(i)];
    const auto at = static_cast<std::uint32_t>(i);
    const auto length = 5 + static_cast<int>(philox(at, 0, 0, 1, key.k0, key.k1).v[0] % 90);
    for (int j = 0; j < length; ++j)
      item.tokens.push_back(static_cast<std::int32_t>(
          philox(at, static_cast<std::uint32_t>(j), 0, 0, key.k0, key.k1).v[0] %
          static_cast<std::uint32_t>(vocab)));
    item.answer_begin = length / 2;
  }
  return items;
}

}  // namespace mixlora
