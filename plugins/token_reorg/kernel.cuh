// The body of evit::TokenReorg, written for a team of threads that share memory and can wait for each other: a block of
// a GPU, or threads of a CPU (kernel_host.cpp), so that everything but the launch is tested without a GPU.
//
// One team serves one image and a range of its columns. Its first loads of x are under way while it ranks the
// candidates; teams of the same image repeat the ranking, which is cheaper than waiting for each other. Then every row
// is handled once: kept ones are written where they belong, the others are added up.
//
// With few images the rows are cut too: one team adds up the fused row, the others copy the kept rows.
//
// The sum of the fused row does not depend on how the work is cut: row r always belongs to row group r mod G (G follows
// from N alone), a group adds its rows in rising order, and the groups are added in rising order. Every step is one
// fused multiply-add or addition in FP32, so that a CPU and every GPU give the same bits, whatever the batch.
#pragma once

#include "numbers.cuh"
#include "token_reorg.h"

namespace evit {

constexpr int kRowsInFlight = 8;    // loads of x that a thread has under way
constexpr int kScoresInFlight = 4;  // and of scores
constexpr int kSumsInFlight = 16;   // and of partial sums; divides the number of row groups
constexpr int kRun = 64;            // candidates that are ranked by counting, before runs are merged
constexpr int kFan = 4;             // runs that are merged at a time

// ---- ranking

// Rises with the score and is above 0. Equal scores have equal keys, +0 and -0 too; a NaN has a key like any other.
EVIT_HOST_DEVICE inline uint32_t key_of(float score) {
  const uint32_t bits = bits_of(score + 0.0f), key = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return key > 0 ? key : 1;
}

// The score that a key was made of; -0 has become +0.
EVIT_HOST_DEVICE inline float score_of(uint32_t key) { return float_of(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

struct alignas(16) Keys {
  uint32_t items[4];
};

// Keys, filled up with zeros to whole runs on every level.
EVIT_HOST_DEVICE inline int key_slots(int candidates) {
  int slots = kRun;
  while (slots < candidates) slots *= kFan;
  return slots;
}

// Keys, and where runs are merged a second set of them and two of the candidates' numbers.
EVIT_HOST_DEVICE inline int ranking_bytes(int candidates) {
  return key_slots(candidates) * (candidates <= kRun ? 1 : 3) * static_cast<int>(sizeof(uint32_t));
}

// Adds one if a key is above a limit. By hand: the compiler makes three dependent instructions of it.
EVIT_HOST_DEVICE inline void count_above(uint32_t key, uint32_t limit, int& sum) {
#if defined(__CUDA_ARCH__)
  asm("{ .reg .pred p; setp.gt.u32 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(sum) : "r"(key), "r"(limit));
#else
  sum += key > limit;
#endif
}

// How many of a run are ahead of its candidate i: a higher score, or an equal one and a lower number.
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

// Where the key at place i of one of kFan sorted runs belongs among all of them: its place in its own run, and how many
// are ahead in each of the others, which are searched side by side. Candidates of earlier runs have lower numbers.
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

// Calls place(candidate, rank, key) for every candidate. The first keys have been written, and waited for.
//
// A candidate's rank is the number of those ahead of it. In runs of kRun these are counted; sorted runs are merged,
// kFan at a time, until one is left.
template <class Team, class Place>
EVIT_HOST_DEVICE void rank_candidates(const Team& team, int candidates, unsigned char* memory, Place place) {
  const int slots = key_slots(candidates);
  uint32_t* keys = reinterpret_cast<uint32_t*>(memory);  // to read from, and to write to
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

// ---- how the work is cut

// Rows whose numbers differ by this are added by the same members, whatever the cut.
EVIT_HOST_DEVICE inline int row_groups(int candidates) { return candidates <= 512 ? 32 : 64; }

constexpr int kNarrowBlock = 256, kWideBlock = 512;  // threads

struct Geometry {
  int lane_bits;  // a team has 2^lane_bits accesses side by side, and row_groups times as many members
  int tiles;      // teams that share an image's columns
  int slices;     // teams that share a tile's rows: with a fused row the first adds it up, the others copy
  int early;      // whether the first rows are loaded before it is known which of them stay
  int threads;    // of a block
};

// Few images: narrow teams, many to an image, to reach every multiprocessor; if they are still too few, the rows are
// cut so that each team has all of its loads under way at once. Many images: wide teams, for longer accesses, and
// where ranking takes long as few to an image as still fill the device. The limits were measured on an H100.
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

// What a cut that was asked for says replaces what would be chosen.
inline Geometry apply_cut(Geometry geometry, const EvitCut& cut) {
  if (cut.lanes > 0)
    for (geometry.lane_bits = 0; 1 << geometry.lane_bits < cut.lanes;) ++geometry.lane_bits;
  if (cut.tiles > 0) geometry.tiles = cut.tiles;
  if (cut.slices > 0) geometry.slices = cut.slices;
  if (cut.early > 0) geometry.early = cut.early - 1;
  if (cut.threads > 0) geometry.threads = cut.threads;
  return geometry;
}

// What becomes of a row: its place in y, or -1 and its weight in the fused row.
struct alignas(8) Fate {
  int32_t to;
  float weight;
};

// The scratch memory holds the keys while candidates are ranked and the partial sums afterwards.
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

// What a team does.
//
//   scratch  scratch_bytes(), aligned to 16
//   fates    one for each row
template <class T, int kWidth, class Team>
EVIT_HOST_DEVICE void token_reorg(const Team& team, const EvitTokenReorgCall& call, Share share, Geometry geometry,
                                  unsigned char* scratch, Fate* fates) {
  using Access = Pack<T, kWidth>;
  const int rows = call.prefix + call.candidates, rows_out = call.prefix + call.keep + call.fuse;
  const int channels = call.channels;
  const int64_t before = share.image;  // images in front; in 64 bits, as all offsets
  const float* scores = call.scores + before * call.candidates;
  const T* x = static_cast<const T*>(call.x) + before * rows * channels;
  T* y = static_cast<T*>(call.y) + before * rows_out * channels;

  const bool cut = geometry.slices > 1;
  const bool copies = !cut || !call.fuse || share.slice > 0;
  const bool sums = call.fuse && (!cut || share.slice == 0);
  const int part = cut && copies ? share.slice - call.fuse : 0;
  const int parts = cut && copies ? geometry.slices - call.fuse : 1;

  // A member has one lane of the rows first_row, first_row + row_step and so on.
  const int lanes = 1 << geometry.lane_bits, groups = row_groups(call.candidates), members = groups * lanes;
  const int chunks = divide_up(divide_up(channels, kWidth), lanes);
  const int row_step = groups * parts;
  const auto first_row = [&](int member) { return (member >> geometry.lane_bits) + groups * part; };
  const auto column_of = [&](int chunk, int member) { return (chunk * lanes + (member & (lanes - 1))) * kWidth; };

  // Scores are asked for first, since the ranking waits for them, then the first rows.
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
    // 0 is ahead of nothing.
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
  team.barrier();  // fates are known, and the keys are no longer needed

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
