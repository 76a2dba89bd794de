// The body of evit::TokenReorg, written for a team of threads with shared memory and a barrier: a block on a GPU, or
// CPU threads (kernel_host.cpp), so that everything but the launch can be tested without a GPU.
//
// A team handles one image and a range of its columns. It starts to load x before it ranks the candidates. Teams of the
// same image repeat the ranking, which is cheaper than synchronizing. Then each row is handled once: kept rows are
// written to their position, the others are summed.
//
// With few images the rows are partitioned too: one team sums the fused row, the others copy the kept rows.
//
// The sum of the fused row does not depend on the partition: row r always belongs to row group r mod G (G depends on N
// only), a group adds its rows in ascending order, and the groups are added in ascending order. Each step is one fused
// multiply-add or addition in FP32, so the results are bit-identical on CPUs and all GPUs and for every batch.
#pragma once

#include "numbers.cuh"
#include "token_reorg.h"

namespace evit {

constexpr int kRowsInFlight = 8;    // loads of x in flight per thread
constexpr int kScoresInFlight = 4;  // loads of scores
constexpr int kSumsInFlight = 16;   // loads of partial sums; divides the number of row groups
constexpr int kRun = 64;            // candidates ranked by counting, before runs are merged
constexpr int kFan = 4;             // runs merged at a time

// ---- ranking

// Key of a score: ascending with the score, above 0, equal for equal scores (also +0 and -0); defined for NaN.
EVIT_HOST_DEVICE inline uint32_t key_of(float score) {
  const uint32_t bits = bits_of(score + 0.0f), key = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return key > 0 ? key : 1;
}

// The score of a key; -0 becomes +0.
EVIT_HOST_DEVICE inline float score_of(uint32_t key) { return float_of(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

struct alignas(16) Keys {
  uint32_t items[4];
};

// Number of keys, padded with zeros to whole runs on every level.
EVIT_HOST_DEVICE inline int key_slots(int candidates) {
  int slots = kRun;
  while (slots < candidates) slots *= kFan;
  return slots;
}

// Memory for the keys, and if runs are merged for a second set of keys and two sets of candidate indices.
EVIT_HOST_DEVICE inline int ranking_bytes(int candidates) {
  return key_slots(candidates) * (candidates <= kRun ? 1 : 3) * static_cast<int>(sizeof(uint32_t));
}

// Adds one if a key is above a limit. In assembly, because the compiler generates three dependent instructions.
EVIT_HOST_DEVICE inline void count_above(uint32_t key, uint32_t limit, int& sum) {
#if defined(__CUDA_ARCH__)
  asm("{ .reg .pred p; setp.gt.u32 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(sum) : "r"(key), "r"(limit));
#else
  sum += key > limit;
#endif
}

// Number of candidates of a run ahead of its candidate i: with a higher score, or an equal score and a lower index.
EVIT_HOST_DEVICE inline int count_ahead(const Keys* run, int i, uint32_t key) {
  const int own = i / 4;
  int ahead[4] = {};
  EVIT_UNROLL
  for (int quad = 0; quad < kRun / 4; ++quad) {
    const Keys other = run[quad];
    const uint32_t limit = quad < own ? key - 1 : key;
    EVIT_UNROLL
    for (int item = 0; item < 4; ++item) count_above(other.items[item], limit, ahead[item]);
  }
  const Keys near = run[own];
  EVIT_UNROLL
  for (int item = 0; item < 3; ++item) ahead[item] += item < i % 4 && near.items[item] == key;
  return ahead[0] + ahead[1] + ahead[2] + ahead[3];
}

// Position of the key at index i of one of kFan sorted runs in the merged run: i plus the number of keys ahead of it in
// each of the others, found by simultaneous binary searches. Candidates of earlier runs have lower indices.
EVIT_HOST_DEVICE inline int merged_place(const uint32_t* keys, int length, int i) {
  const int start = i & ~(kFan * length - 1), own = i & ((kFan - 1) * length), inside = i & (length - 1);
  const uint32_t key = keys[i];
  int first[kFan - 1], at[kFan - 1];
  uint32_t limit[kFan - 1];
  EVIT_UNROLL
  for (int r = 0; r < kFan - 1; ++r) {
    const int other = own ^ ((r + 1) * length);
    first[r] = at[r] = start + other;
    limit[r] = other < own ? key - 1 : key;
  }
  for (int step = length / 2; step > 0; step /= 2) {
    EVIT_UNROLL
    for (int r = 0; r < kFan - 1; ++r)
      if (keys[at[r] + step - 1] > limit[r]) at[r] += step;
  }
  int place = start + inside;
  EVIT_UNROLL
  for (int r = 0; r < kFan - 1; ++r) place += at[r] - first[r] + (keys[at[r]] > limit[r]);
  return place;
}

// Calls place(candidate, rank, key) for every candidate. The keys must be written, with a barrier afterwards.
//
// A candidate's rank is the number of candidates ahead of it. Within runs of kRun these are counted; then sorted runs
// are merged, kFan at a time, until one is left.
template <class Team, class Place>
EVIT_HOST_DEVICE void rank_candidates(const Team& team, int candidates, unsigned char* memory, Place place) {
  const int slots = key_slots(candidates);
  uint32_t* keys = reinterpret_cast<uint32_t*>(memory);  // read from one half, write to the other
  uint32_t* next_keys = keys + slots;
  uint16_t* order = reinterpret_cast<uint16_t*>(next_keys + slots);
  uint16_t* next_order = order + slots;
  EVIT_ROLLED
  for (int i = team.rank(); i < candidates; i += team.size()) {
    const int run = i & ~(kRun - 1);
    const uint32_t key = keys[i];
    const int ahead = count_ahead(reinterpret_cast<const Keys*>(keys + run), i - run, key);
    if (candidates <= kRun) {
      place(i, ahead, key);
    } else {
      next_keys[run + ahead] = key;
      next_order[run + ahead] = static_cast<uint16_t>(i);
    }
  }
  if (candidates <= kRun) return;
  EVIT_ROLLED
  for (int i = candidates + team.rank(); i < slots; i += team.size()) next_keys[i] = 0;
  EVIT_ROLLED
  for (int length = kRun; length < candidates; length *= kFan) {
    uint32_t* const swapped_keys = keys;
    uint16_t* const swapped_order = order;
    keys = next_keys, order = next_order;
    next_keys = swapped_keys, next_order = swapped_order;
    team.barrier();
    EVIT_ROLLED
    for (int i = team.rank(); i < candidates; i += team.size()) {
      const int to = merged_place(keys, length, i);
      if (length * kFan >= candidates) {
        place(order[i], to, keys[i]);
      } else {
        next_keys[to] = keys[i];
        next_order[to] = order[i];
      }
    }
  }
}

// ---- partition of the work

// Rows with indices that differ by a multiple of this are added by the same members, in every partition.
EVIT_HOST_DEVICE inline int row_groups(int candidates) { return candidates <= 512 ? 32 : 64; }

constexpr int kNarrowBlock = 256, kWideBlock = 512;  // threads

struct Geometry {
  int lane_bits;  // a team has 2^lane_bits adjacent accesses, and row_groups times as many members
  int tiles;      // teams that share an image's columns
  int slices;     // teams that share a tile's rows: with a fused row the first sums it, the others copy
  int early;      // whether to load the first rows before the ranking
  int threads;    // threads of a block
};

// Few images: many narrow teams per image, to use every multiprocessor; if there are still too few teams, the rows are
// partitioned so that each team has all its loads in flight at once. Many images: wide teams, for longer accesses, and
// if ranking is expensive as few teams per image as still fill the device. The limits were measured on an H100.
inline Geometry choose_geometry(const EvitTokenReorgCall& call, int width, int multiprocessors) {
  const int accesses = divide_up(call.channels, width);
  const auto chunks_of = [&](int lane_bits) { return divide_up(accesses, 1 << lane_bits); };
  const auto teams = [&](int lane_bits) { return static_cast<int64_t>(call.batch) * chunks_of(lane_bits); };
  constexpr int kWidest = 4, kNarrowest = 2;  // 256 and 64 bytes of a row
  int lane_bits = kWidest;
  if (teams(lane_bits) < 2 * multiprocessors || chunks_of(kWidest) * 2 > chunks_of(kWidest - 1)) --lane_bits;
  if (teams(lane_bits) < multiprocessors / 2) lane_bits = kNarrowest;
  const int chunks = chunks_of(lane_bits);
  const bool few = teams(lane_bits) < multiprocessors;
  const bool long_ranking = call.candidates > kRun * kFan * kFan;
  const int64_t most = 2 * multiprocessors;
  const int64_t each = long_ranking && teams(lane_bits) > most ? teams(lane_bits) / most : 1;
  const int tiles = divide_up(chunks, each < chunks ? static_cast<int>(each) : chunks);
  const int loads = divide_up(call.prefix + call.candidates, row_groups(call.candidates) * kRowsInFlight);
  int slices = few ? static_cast<int>(multiprocessors / teams(lane_bits)) : 1;
  if (slices > loads + call.fuse) slices = loads + call.fuse;
  const bool wide = long_ranking || (few && call.candidates > kRun * kFan);
  return {lane_bits, tiles, slices, 1, wide ? kWideBlock : kNarrowBlock};
}

// Replaces chosen values by those of a requested partition.
inline Geometry apply_cut(Geometry geometry, const EvitCut& cut) {
  if (cut.lanes > 0)
    for (geometry.lane_bits = 0; 1 << geometry.lane_bits < cut.lanes;) ++geometry.lane_bits;
  if (cut.tiles > 0) geometry.tiles = cut.tiles;
  if (cut.slices > 0) geometry.slices = cut.slices;
  if (cut.early > 0) geometry.early = cut.early - 1;
  if (cut.threads > 0) geometry.threads = cut.threads;
  return geometry;
}

// Fate of a row: its position in y, or -1 and its weight in the fused row.
struct alignas(8) Fate {
  int32_t to;
  float weight;
};

// Scratch memory, for the keys during ranking and for the partial sums afterwards.
EVIT_HOST_DEVICE inline int scratch_bytes(const EvitTokenReorgCall& call, Geometry geometry, int width) {
  const int keys = ranking_bytes(call.candidates);
  const int accesses = row_groups(call.candidates) << geometry.lane_bits;
  const int sums = call.fuse ? accesses * width * static_cast<int>(sizeof(float)) : 0;
  return keys > sums ? keys : sums;
}

// ---- the op

// A team's share of the work.
struct Share {
  int image, tile, slice;
};

// Work of a team.
//
//   scratch  scratch_bytes(), aligned to 16
//   fates    one for each row
template <class T, int kWidth, class Team>
EVIT_HOST_DEVICE void token_reorg(const Team& team, const EvitTokenReorgCall& call, Share share, Geometry geometry,
                                  unsigned char* scratch, Fate* fates) {
  using Access = Pack<T, kWidth>;
  const int rows = call.prefix + call.candidates, rows_out = call.prefix + call.keep + call.fuse;
  const int channels = call.channels;
  const int64_t before = share.image;  // preceding images; in 64 bits like all offsets
  const float* scores = call.scores + before * call.candidates;
  const T* x = static_cast<const T*>(call.x) + before * rows * channels;
  T* y = static_cast<T*>(call.y) + before * rows_out * channels;

  const bool cut = geometry.slices > 1;
  const bool copies = !cut || !call.fuse || share.slice > 0;
  const bool sums = call.fuse && (!cut || share.slice == 0);
  const int part = cut && copies ? share.slice - call.fuse : 0;
  const int parts = cut && copies ? geometry.slices - call.fuse : 1;

  // A member handles one lane of the rows first_row, first_row + row_step, ...
  const int lanes = 1 << geometry.lane_bits, groups = row_groups(call.candidates), members = groups * lanes;
  const int chunks = divide_up(divide_up(channels, kWidth), lanes);
  const int row_step = groups * parts;
  const auto first_row = [&](int member) { return (member >> geometry.lane_bits) + groups * part; };
  const auto column_of = [&](int chunk, int member) { return (chunk * lanes + (member & (lanes - 1))) * kWidth; };

  // Load the scores first, because the ranking needs them, then the first rows.
  float early_scores[kScoresInFlight];
  EVIT_UNROLL
  for (int i = 0; i < kScoresInFlight; ++i) {
    const int candidate = team.rank() + i * team.size();
    early_scores[i] = candidate < call.candidates ? scores[candidate] : 0.0f;
  }
  Access pack[kRowsInFlight] = {};
  bool loaded = geometry.early && team.rank() < members && column_of(share.tile, team.rank()) < channels;
  if (loaded) {
    const T* from = x + column_of(share.tile, team.rank());
    EVIT_UNROLL
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int row = first_row(team.rank()) + i * row_step;
      if (row < rows) pack[i] = *reinterpret_cast<const Access*>(from + static_cast<int64_t>(row) * channels);
    }
  }

  uint32_t* keys = reinterpret_cast<uint32_t*>(scratch);
  const int slots = key_slots(call.candidates);
  EVIT_UNROLL
  for (int i = 0; i < kScoresInFlight; ++i) {
    const int candidate = team.rank() + i * team.size();
    // The padding key 0 is below all others.
    if (candidate < slots) keys[candidate] = candidate < call.candidates ? key_of(early_scores[i]) : 0;
  }
  EVIT_ROLLED
  for (int candidate = team.rank() + kScoresInFlight * team.size(); candidate < slots; candidate += team.size())
    keys[candidate] = candidate < call.candidates ? key_of(scores[candidate]) : 0;
  for (int row = team.rank(); row < call.prefix; row += team.size()) fates[row] = {row, 0.0f};
  team.barrier();
  int32_t* idx = share.tile == 0 && share.slice == 0 && call.idx != nullptr ? call.idx + before * call.keep : nullptr;
  rank_candidates(team, call.candidates, scratch, [&](int candidate, int rank, uint32_t key) {
    const bool kept = rank < call.keep;
    fates[call.prefix + candidate] = {kept ? call.prefix + rank : -1, score_of(key)};
    if (kept && idx != nullptr) idx[rank] = candidate;
  });
  team.barrier();  // fates are written, and the keys are no longer needed

  float* partial = reinterpret_cast<float*>(scratch);  // [groups][lanes * kWidth]
  for (int chunk = share.tile; chunk < chunks; chunk += geometry.tiles) {
    for (int member = team.rank(); member < members; member += team.size()) {
      const int column = column_of(chunk, member);
      float sum[kWidth] = {};
      if (column < channels) {
        for (int first = first_row(member); first < rows; first += row_step * kRowsInFlight) {
          if (!loaded) {
            EVIT_UNROLL
            for (int i = 0; i < kRowsInFlight; ++i) {
              const int row = first + i * row_step;
              if (row < rows && ((copies && sums) || (fates[row].to >= 0 ? copies : sums)))
                pack[i] = *reinterpret_cast<const Access*>(x + static_cast<int64_t>(row) * channels + column);
            }
          }
          loaded = false;
          Fate next = fates[first];
          EVIT_UNROLL
          for (int i = 0; i < kRowsInFlight; ++i) {
            const int row = first + i * row_step;
            if (row >= rows) break;
            const Fate fate = next;
            if (i + 1 < kRowsInFlight && row + row_step < rows) next = fates[row + row_step];
            if (fate.to >= 0) {
              if (copies) *reinterpret_cast<Access*>(y + static_cast<int64_t>(fate.to) * channels + column) = pack[i];
            } else if (sums) {
              EVIT_UNROLL
              for (int j = 0; j < kWidth; ++j) sum[j] = fmaf(fate.weight, pack[i][j], sum[j]);
            }
          }
        }
      }
      if (sums)
        for (int j = 0; j < kWidth; ++j) partial[member * kWidth + j] = sum[j];
    }
    if (!sums) continue;
    team.barrier();
    for (int j = team.rank(); j < lanes * kWidth; j += team.size()) {
      const int column = chunk * lanes * kWidth + j;
      if (column >= channels) continue;
      float total = 0.0f;
      for (int first = 0; first < groups; first += kSumsInFlight) {
        float sum[kSumsInFlight];
        EVIT_UNROLL
        for (int i = 0; i < kSumsInFlight; ++i) sum[i] = partial[(first + i) * lanes * kWidth + j];
        EVIT_UNROLL
        for (int i = 0; i < kSumsInFlight; ++i) total += sum[i];
      }
      from_float(total, y[static_cast<int64_t>(rows_out - 1) * channels + column]);
    }
    team.barrier();  // before the next chunk's sums
  }
}

// Whether rows can be moved 16 bytes at a time.
inline bool has_whole_accesses(const EvitTokenReorgCall& call) {
  const int bytes = call.dtype == EVIT_FP32 ? 4 : 2;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(call.x) | reinterpret_cast<uintptr_t>(call.y);
  return addresses % 16 == 0 && static_cast<int64_t>(call.channels) * bytes % 16 == 0;
}

}  // namespace evit
