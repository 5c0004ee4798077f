// The order of a mixture's rows, tiles of one pair of experts, and A2 turned, in one launch.
#pragma once
#include "kernels/cuda/rank_tiles.cuh"

namespace mixlora::cuda {

/// Where one pass's order and the lists of pairs lie in the call's working memory.
struct OrderRoom {
  std::int32_t *order, *tiles, *pairs, *pair_begin, *work;
  std::uint32_t* held;  // a number for every row and every pair
  int most_tiles;
};
/// Rows by the experts of slots [first, first + count): every key begins at a multiple of `align`
/// places; a team has `team_units` units of work where 64 columns of a team are that many (0: no
/// teams). `pairs`: all (row, slot) pairs by expert too.
struct OrderCall {
  const std::int32_t* expert;  // (rows, slots), null: no order
  int rows, slots, experts, first, count, align, team_units;
  bool pairs;
};
/// A2 of every expert by columns, (E, F, R) from (E, R, F): a unit is two columns of eight ranks.
struct Turn {
  Number* to;
  const Number* from;  // null: no unit
  int width, rank, experts;
  __host__ __device__ int units() const {
    return from == nullptr ? 0 : experts * (rank / 8) * (width / 2);
  }
};

/// Whether a device's shared memory admits the order of `count` slots at once.
bool order_fits(int count, int experts);
/// order: rows by key, equal keys as they come, -1 where a key's last tile is not full; tiles: how
/// many; work: a team's first unit, and all teams'. pairs: those without an expert last; pair_begin
/// where each expert's start. The result is the same however the warps run.
void order_rows(const OrderRoom& room, const OrderCall& call, const Turn& down,
                cudaStream_t stream);

}  // namespace mixlora::cuda
