// A counting sort by a cluster of blocks, or by one block where the device has no clusters. Each
// block counts its run of items, hands its counts to the others through their shared memory, and
// places its items. Every step is latency: loops are not unrolled, since these blocks run through
// the code once, and to fetch it takes longer than to run it.
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/mixture_order.cuh"
#include "kernels/cuda/mixture_tiles.cuh"

namespace mixlora::cuda {
namespace {

constexpr int kTogetherBlocks = 8;  // of a cluster
template <int Blocks> constexpr int kSortThreads = Blocks == 1 ? 1024 : 512;

/// A key and how many of its warp's items before have it, as an item's held number.
constexpr int kBeforeBits = 21;

/// What is sorted, and to where: `places` numbers of order, -1 where no item is. begin, tiles and
/// work may be null.
struct Sort {
  std::int32_t *order, *begin, *tiles, *work;
  std::uint32_t* held;
  int items, keys, align, team_units, places;
};
/// A block's shared memory, in numbers for every key: of each warp how many items have it, then how
/// many of the warps before; of each block; its first place and the one behind its items, units of
/// teams before it. Behind them what is held of the block's items, where there is room.
template <int Blocks> struct SortRoom {
  static constexpr int kThreads = kSortThreads<Blocks>, kWarps = kThreads / kWarp;
  static constexpr Index bytes(int keys) {
    return static_cast<Index>(sizeof(std::int32_t)) * ((kWarps + Blocks + 3) * keys + 1);
  }
  /// Items of a warp.
  __host__ __device__ static int chunk(int items) {
    return ceil_div(ceil_div(items, Blocks * kWarps), kWarp) * kWarp;
  }
  std::int32_t *counts, *blocks, *first, *behind, *units;
  std::uint32_t* held;
  __device__ SortRoom(std::int32_t* numbers, int keys)
      : counts(numbers),
        blocks(counts + kWarps * keys),
        first(blocks + Blocks * keys),
        behind(first + keys + 1),
        units(behind + keys),
        held(reinterpret_cast<std::uint32_t*>(units + keys)) {}
};

__device__ inline int up_to(int x, int lane) {  // with all lanes before
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int y = __shfl_up_sync(kAll, x, step);
    if (lane >= step) x += y;
  }
  return x;
}

template <int Blocks, class Key>
__device__ void counting_sort(const Sort& s, const SortRoom<Blocks>& room, bool held_here,
                              Key key_of) {
  constexpr int kThreads = kSortThreads<Blocks>, kWarps = kThreads / kWarp,
                kAhead = 2;  // items of a thread whose keys are on their way
  __shared__ int2 warp_sums[kWarps];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp,
            block = static_cast<int>(blockIdx.x) % Blocks;
  if constexpr (Blocks > 1) cluster_arrive();  // a block that runs may be written to
  const int chunk = SortRoom<Blocks>::chunk(s.items), block_from = block * kWarps * chunk,
            from = block_from + warp * chunk, to = min(s.items, from + chunk);
  std::uint32_t* held = held_here ? room.held : s.held + block_from;
#pragma unroll 1
  for (int first = from + lane; first < to; first += kAhead * kWarp) {
    int key[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) key[j] = key_of(min(first + j * kWarp, to - 1));
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (const int i = first + j * kWarp; i < to)
        held[i - block_from] = static_cast<std::uint32_t>(key[j]);
  }
  std::int32_t* own = room.counts + warp * s.keys;
#pragma unroll 1
  for (int key = lane; key < s.keys; key += kWarp) own[key] = 0;
  __syncwarp();
#pragma unroll 1
  for (int i = from + lane; i - lane < to; i += kWarp) {
    const int key = i < to ? static_cast<int>(held[i - block_from]) : -1;
    const unsigned same = __match_any_sync(kAll, key);
    const int before =
        (key >= 0 ? own[key] : 0) + __popc(same & ((1U << static_cast<unsigned>(lane)) - 1));
    __syncwarp();
    if (key >= 0) {
      held[i - block_from] = static_cast<std::uint32_t>(key << kBeforeBits | before);
      if ((same >> static_cast<unsigned>(lane)) == 1) own[key] = before + 1;  // the last of its key
    }
    __syncwarp();
  }
  __syncthreads();
  if constexpr (Blocks > 1) cluster_wait();
#pragma unroll 1
  for (int key = thread; key < s.keys; key += kThreads) {
    constexpr int kAtOnce = 16;
    int before = 0;
#pragma unroll 1
    for (int w = 0; w < kWarps; w += kAtOnce) {
      std::int32_t* at = room.counts + w * s.keys + key;
      int count[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) count[i] = at[i * s.keys];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        at[i * s.keys] = before;
        before += count[i];
      }
    }
    if constexpr (Blocks == 1) room.blocks[key] = before;
    if constexpr (Blocks > 1)
#pragma unroll
      for (int b = 0; b < Blocks; ++b)
        store_there(place_in(b, shared_address(room.blocks + block * s.keys + key)), before);
  }
  if constexpr (Blocks > 1) {
    cluster_meet();
  } else {
    __syncthreads();
  }

  // A thread's keys: how many items the blocks before have, and all; a key's places and units.
  const int each = ceil_div(s.keys, kThreads), key_from = thread * each,
            key_to = min(s.keys, key_from + each);
  int2 mine = make_int2(0, 0);
#pragma unroll 1
  for (int key = key_from; key < key_to; ++key) {
    int before = 0, all = 0;
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
      const int count = room.blocks[b * s.keys + key];
      before += b < block ? count : 0;
      all += count;
    }
    // The third tile of a team's last rows has one: all four warps have some (TeamWork).
    const int last = (all + kTeamRows - 1) % kTeamRows + 1, teams = ceil_div(all, kTeamRows);
    const int places = ceil_div(all, s.align) * s.align,
              units = all == 0 ? 0 : (2 * teams - (last > 2 * kRows ? 0 : 1)) * s.team_units;
    room.blocks[key] = before;
    room.behind[key] = all;
    room.first[key] = places;
    room.units[key] = units;
    mine.x += places, mine.y += units;
  }
  int2 at = make_int2(0, 0);
  if (warp * kWarp * each < s.keys) {
    at = make_int2(up_to(mine.x, lane), up_to(mine.y, lane));
    if (lane == kWarp - 1) warp_sums[warp] = at;
    at.x -= mine.x, at.y -= mine.y;
  }
  __syncthreads();
  if (key_from < key_to)
#pragma unroll 1
    for (int w = 0; w < warp; ++w) at.x += warp_sums[w].x, at.y += warp_sums[w].y;
#pragma unroll 1
  for (int key = key_from; key < key_to; ++key) {
    const int places = room.first[key], units = room.units[key];
    room.blocks[key] += at.x;
    room.behind[key] += at.x;
    room.first[key] = at.x;
    room.units[key] = at.y;
    if (block == 0 && s.begin != nullptr) s.begin[key] = at.x;
    at.x += places, at.y += units;
  }
  if (key_from < s.keys && key_to == s.keys) {
    room.first[s.keys] = at.x;
    if (block == 0 && s.tiles != nullptr) *s.tiles = at.x / kRows;
    if (block == 0 && s.team_units > 0) s.work[at.x / kTeamRows] = at.y;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = from + lane; i < to; i += kWarp) {
    const std::uint32_t x = held[i - block_from];
    const int key = static_cast<int>(x >> kBeforeBits),
              place = room.blocks[key] + own[key] + static_cast<int>(x & ((1U << kBeforeBits) - 1));
    s.order[place] = i;
    if (s.team_units > 0 && place % kTeamRows == 0)
      s.work[place / kTeamRows] =
          room.units[key] + (place - room.first[key]) / kTeamRows * 2 * s.team_units;
  }
#pragma unroll 1
  for (int key = block * kWarps + warp; key < s.keys; key += Blocks * kWarps)
#pragma unroll 1
    for (int i = room.behind[key] + lane; i < room.first[key + 1]; i += kWarp) s.order[i] = -1;
#pragma unroll 1
  for (int i = room.first[s.keys] + block * kThreads + thread; i < s.places; i += Blocks * kThreads)
    s.order[i] = -1;
}

__device__ void turn(const Turn& t, int unit) {
  // Neighbouring lanes have all ranks of two columns, so that they write them as they lie.
  const int eights = t.rank / 8, r = unit % eights * 8, pair = unit / eights, half = t.width / 2;
  const int e = pair / half, f = pair % half * 2;
  const Number* from = t.from + ((static_cast<Index>(e) * t.rank + r) * t.width + f);
  unsigned x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = load_pair(from + static_cast<Index>(i) * t.width);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const unsigned take = j == 0 ? 0x5410U : 0x7632U;  // both lower halves, both upper ones
    *reinterpret_cast<uint4*>(t.to + (static_cast<Index>(e) * t.width + f + j) * t.rank + r) =
        make_uint4(__byte_perm(x[0], x[1], take), __byte_perm(x[2], x[3], take),
                   __byte_perm(x[4], x[5], take), __byte_perm(x[6], x[7], take));
  }
}

/// The first of `sorts` sorts makes the order, the second the lists of pairs; the blocks behind
/// them turn A2.
template <int Blocks>
__global__ void __launch_bounds__(kSortThreads<Blocks>)
    order_kernel(const OrderRoom room, const OrderCall c, int keys, int sorts, bool held_here,
                 const Turn down) {
  extern __shared__ std::int32_t numbers[];
  const auto sort = static_cast<int>(blockIdx.x) / Blocks;
  if (sort >= sorts) {
    const int unit = (static_cast<int>(blockIdx.x) - sorts * Blocks) * kSortThreads<Blocks> +
                     static_cast<int>(threadIdx.x);
    if (unit < down.units()) turn(down, unit);
  } else if (sort == 0) {
    const Sort rows{room.order, nullptr, room.tiles, room.work,    room.held,
                    c.rows,     keys,    c.align,    c.team_units, room.most_tiles * kRows};
    counting_sort<Blocks>(rows, SortRoom<Blocks>(numbers, keys), held_here, [=](int n) {
      const std::int32_t* chosen = c.expert + n * c.slots + c.first;
      const int e0 = chosen[0] + 1;
      if (c.count == 1) return e0;
      const int e1 = chosen[1] + 1;
      return min(e0, e1) * (c.experts + 1) + max(e0, e1);
    });
  } else {
    const int items = c.rows * c.slots;
    const Sort pairs{room.pairs, room.pair_begin, nullptr, nullptr, room.held + c.rows,
                     items,      c.experts + 1,   1,       0,       items};
    counting_sort<Blocks>(pairs, SortRoom<Blocks>(numbers, c.experts + 1), held_here, [=](int i) {
      const int e = c.expert[i];
      return e < 0 ? c.experts : e;
    });
  }
}

int most_sorted() {
  constexpr int kStatic = 512;  // what the kernel has besides
  return most_shared() - kStatic;
}

template <int Blocks>
void launch_order(const OrderRoom& room, const OrderCall& c, const Turn& down,
                  cudaStream_t stream) {
  constexpr int kThreads = kSortThreads<Blocks>, kWarps = kThreads / kWarp;
  const int sorts = c.expert == nullptr ? 0 : c.pairs ? 2 : 1, keys = keys_of(c.count, c.experts);
  const int blocks = ceil_div(sorts * Blocks + ceil_div(down.units(), kThreads), Blocks) * Blocks;
  if (blocks == 0) return;
  const int most = most_sorted(), items = c.rows * (sorts > 1 ? c.slots : 1);
  const Index counted = sorts > 0 ? SortRoom<Blocks>::bytes(keys) : 0,
              all = counted + static_cast<Index>(sizeof(std::uint32_t)) * kWarps *
                                  SortRoom<Blocks>::chunk(items);
  const bool held_here = sorts > 0 && all <= most;
  admit_shared(reinterpret_cast<const void*>(order_kernel<Blocks>), most);
  launch_in_clusters(dim3(Blocks), order_kernel<Blocks>, dim3(static_cast<unsigned>(blocks)),
                     kThreads, static_cast<std::size_t>(held_here ? all : counted), stream,
                     "mixture order", room, c, keys, sorts, held_here, down);
}

}  // namespace

bool order_fits(int count, int experts) {
  return SortRoom<1>::bytes(keys_of(count, experts)) <= most_sorted();
}

void order_rows(const OrderRoom& room, const OrderCall& call, const Turn& down,
                cudaStream_t stream) {
  if (in_clusters(order_kernel<kTogetherBlocks>))
    launch_order<kTogetherBlocks>(room, call, down, stream);
  else
    launch_order<1>(room, call, down, stream);
}

}  // namespace mixlora::cuda
