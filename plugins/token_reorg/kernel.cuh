// The body of evit::TokenReorg, written for a team of threads that share memory and can wait for each other: a block of
// a GPU, or threads of a CPU (kernel_host.cpp), so that everything but the launch is tested without a GPU.
//
// One team serves one image and a range of its columns. It ranks all candidates first; teams of the same image repeat
// that, which is cheaper than waiting for each other. Then every row is read once, kept ones are written where they
// belong, the others are added up.
//
// The sum of the fused row does not depend on how the work is cut: row r always belongs to row group r mod kRowGroups,
// a group adds its rows in rising order, and the groups are added in rising order. Every step is one fused multiply-add
// or addition in FP32, so that a CPU and every GPU give the same bits, whatever the batch.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "token_reorg.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define EVIT_HOST_DEVICE __host__ __device__
#define EVIT_UNROLL _Pragma("unroll")
#else
#define EVIT_HOST_DEVICE
#define EVIT_UNROLL
#endif

namespace evit {

constexpr int kRowGroups = 16;
constexpr int kMaxLanes = 16;  // lanes in a row group, each with one access of 16 bytes: 256 bytes of a row at a time
constexpr int kRowsInFlight = 8;
constexpr int kCountingLimit = 512;  // candidates up to which ranking by counting beats sorting

// ---- types

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

EVIT_HOST_DEVICE inline uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

EVIT_HOST_DEVICE inline float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

EVIT_HOST_DEVICE inline float to_float(float value) { return value; }

EVIT_HOST_DEVICE inline float to_float(Bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

EVIT_HOST_DEVICE inline float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  _Float16 half;
  memcpy(&half, &value.bits, sizeof half);
  return static_cast<float>(half);
#endif
}

EVIT_HOST_DEVICE inline void from_float(float value, float& to) { to = value; }

EVIT_HOST_DEVICE inline void from_float(float value, Bfloat16& to) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  // To nearest, ties to even; a NaN must not be rounded into infinity.
  to.bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

EVIT_HOST_DEVICE inline void from_float(float value, Half& to) {
#if defined(__CUDA_ARCH__)
  to.bits = __half_as_ushort(__float2half_rn(value));
#else
  const _Float16 half = static_cast<_Float16>(value);
  memcpy(&to.bits, &half, sizeof to.bits);
#endif
}

// What one access moves.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T items[kWidth];
};

// ---- how the work is cut

struct Geometry {
  int lanes;  // a power of two; a team has lanes * kRowGroups members
  int tiles;  // teams that share an image
};

EVIT_HOST_DEVICE inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// Few images: narrow teams, many to an image, to reach every multiprocessor. Many: wide ones, for longer accesses, and
// as few to an image as still fill the device, since each ranks the candidates anew.
inline Geometry choose_geometry(int batch, int accesses, int multiprocessors) {
  const int64_t narrow = static_cast<int64_t>(batch) * divide_up(accesses, kMaxLanes);
  const int lanes = narrow < multiprocessors ? kMaxLanes / 2 : kMaxLanes;
  const int chunks = divide_up(accesses, lanes);
  constexpr int kTeamsToAMultiprocessor = 3;
  const int wanted = divide_up(kTeamsToAMultiprocessor * multiprocessors, batch);
  return {lanes, wanted < chunks ? wanted : chunks};
}

EVIT_HOST_DEVICE inline int sorted_length(int candidates) {
  int length = 1;
  while (length < candidates) length *= 2;
  return length;
}

// The scratch memory holds the keys while candidates are ranked and the partial sums afterwards.
EVIT_HOST_DEVICE inline int scratch_bytes(const EvitTokenReorgCall& call, int lanes, int width) {
  const int keys = call.candidates <= kCountingLimit
                       ? divide_up(call.candidates, 4) * 16
                       : sorted_length(call.candidates) * static_cast<int>(sizeof(uint64_t));
  const int sums = call.fuse ? kRowGroups * lanes * width * static_cast<int>(sizeof(float)) : 0;
  return keys > sums ? keys : sums;
}

// ---- ranking

// Rises with the score. Equal scores have equal keys, +0 and -0 too; a NaN has a key like any other.
EVIT_HOST_DEVICE inline uint32_t key_of(float score) {
  const uint32_t bits = bits_of(score + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

struct alignas(16) Keys {
  uint32_t items[4];
};

// A candidate's rank is the number of those ahead of it: no barrier, no data-dependent path.
template <class Team, class Place>
EVIT_HOST_DEVICE void rank_by_counting(const Team& team, const float* scores, int candidates, Keys* keys, Place place) {
  const int quads = divide_up(candidates, 4);
  for (int i = team.rank(); i < quads * 4; i += team.size())
    keys[i / 4].items[i % 4] = i < candidates ? key_of(scores[i]) : 0;  // 0 is ahead of nobody in front of it
  team.barrier();
  for (int i = team.rank(); i < candidates; i += team.size()) {
    const int own = i / 4;
    const uint32_t key = keys[own].items[i % 4];
    int ahead = 0;
    for (int quad = 0; quad < own; ++quad) {
      const Keys other = keys[quad];
      EVIT_UNROLL
      for (int item = 0; item < 4; ++item) ahead += other.items[item] >= key;
    }
    for (int item = 0; item < 4; ++item) {
      const uint32_t other = keys[own].items[item];
      ahead += item < i % 4 ? other >= key : other > key;
    }
    for (int quad = own + 1; quad < quads; ++quad) {
      const Keys other = keys[quad];
      EVIT_UNROLL
      for (int item = 0; item < 4; ++item) ahead += other.items[item] > key;
    }
    place(i, ahead);
  }
}

// Bitonic sort (Batcher 1968) of key and index in one number: N log^2 N instead of N^2, for many candidates.
template <class Team, class Place>
EVIT_HOST_DEVICE void rank_by_sorting(const Team& team, const float* scores, int candidates, uint64_t* keys,
                                      Place place) {
  const int length = sorted_length(candidates);
  for (int i = team.rank(); i < length; i += team.size())  // rising order: the highest score, then the lowest index
    keys[i] =
        i < candidates ? static_cast<uint64_t>(~key_of(scores[i])) << 32 | static_cast<uint32_t>(i) : ~uint64_t{0};
  team.barrier();
  for (int run = 2; run <= length; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int pair = team.rank(); pair < length / 2; pair += team.size()) {
        const int low = 2 * pair - (pair & (distance - 1));
        const uint64_t a = keys[low], b = keys[low + distance];
        if ((a > b) == ((low & run) == 0)) {
          keys[low] = b;
          keys[low + distance] = a;
        }
      }
      team.barrier();
    }
  }
  for (int rank = team.rank(); rank < candidates; rank += team.size())
    place(static_cast<int>(static_cast<uint32_t>(keys[rank])), rank);
}

// ---- the op

// What a team does.
//
//   image, tile, geometry  its share
//   scratch                scratch_bytes(), aligned to 16
//   places                 one for each candidate
template <class T, int kWidth, class Team>
EVIT_HOST_DEVICE void token_reorg(const Team& team, const EvitTokenReorgCall& call, int image, int tile,
                                  Geometry geometry, unsigned char* scratch, int16_t* places) {
  using Access = Pack<T, kWidth>;
  const int rows = call.prefix + call.candidates;
  const int rows_out = call.prefix + call.keep + call.fuse;
  const int64_t stride = call.channels, before = image;  // images in front of this one; in 64 bits, as all offsets
  const float* scores = call.scores + before * call.candidates;
  const T* x = static_cast<const T*>(call.x) + before * rows * stride;
  T* y = static_cast<T*>(call.y) + before * rows_out * stride;

  const auto place = [&](int candidate, int rank) {
    const bool kept = rank < call.keep;
    places[candidate] = static_cast<int16_t>(kept ? rank : -1);
    if (kept && tile == 0) call.idx[before * call.keep + rank] = candidate;
  };
  if (call.candidates <= kCountingLimit)
    rank_by_counting(team, scores, call.candidates, reinterpret_cast<Keys*>(scratch), place);
  else
    rank_by_sorting(team, scores, call.candidates, reinterpret_cast<uint64_t*>(scratch), place);
  team.barrier();  // the places are known, and the keys are no longer needed

  const int lanes = geometry.lanes;
  const int accesses = divide_up(call.channels, kWidth);
  const int chunks = divide_up(accesses, lanes);
  float* sums = reinterpret_cast<float*>(scratch);  // [kRowGroups][lanes * kWidth]
  for (int chunk = tile; chunk < chunks; chunk += geometry.tiles) {
    for (int member = team.rank(); member < kRowGroups * lanes; member += team.size()) {
      const int group = member / lanes, lane = member % lanes;
      const int64_t column = (static_cast<int64_t>(chunk) * lanes + lane) * kWidth;
      float sum[kWidth] = {};
      if (column < call.channels) {
        for (int first = group; first < rows; first += kRowGroups * kRowsInFlight) {
          Access pack[kRowsInFlight];
          int to[kRowsInFlight];  // row of y, or -1
          float weight[kRowsInFlight];
          EVIT_UNROLL
          for (int i = 0; i < kRowsInFlight; ++i) {
            const int row = first + i * kRowGroups;
            const int candidate = row - call.prefix;
            to[i] = -1;
            weight[i] = 0.0f;
            if (row >= rows) continue;
            if (candidate < 0)
              to[i] = row;
            else if (places[candidate] >= 0)
              to[i] = call.prefix + places[candidate];
            else if (call.fuse)
              weight[i] = scores[candidate];
            if (to[i] >= 0 || call.fuse) pack[i] = *reinterpret_cast<const Access*>(x + row * stride + column);
          }
          EVIT_UNROLL
          for (int i = 0; i < kRowsInFlight; ++i) {
            if (to[i] >= 0) {
              *reinterpret_cast<Access*>(y + to[i] * stride + column) = pack[i];
            } else if (call.fuse && first + i * kRowGroups < rows) {
              EVIT_UNROLL
              for (int j = 0; j < kWidth; ++j) sum[j] = fmaf(weight[i], to_float(pack[i].items[j]), sum[j]);
            }
          }
        }
      }
      if (call.fuse)
        for (int j = 0; j < kWidth; ++j) sums[member * kWidth + j] = sum[j];
    }
    if (!call.fuse) continue;
    team.barrier();
    for (int j = team.rank(); j < lanes * kWidth; j += team.size()) {
      const int64_t column = static_cast<int64_t>(chunk) * lanes * kWidth + j;
      if (column >= call.channels) continue;
      float total = 0.0f;
      EVIT_UNROLL
      for (int group = 0; group < kRowGroups; ++group) total += sums[group * lanes * kWidth + j];
      from_float(total, y[(rows_out - 1) * stride + column]);
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
