// EViT's scores (equation 2), written for a team of threads like kernel.cuh: softmax of q_cls · Kᵀ · scale over all
// tokens, one head per team; then the mean over heads for each candidate.
//
// Keys are read once, in the layout and type of the projection. With PyTorch's operations the scores cost more than the
// reorganization itself, because each operation writes the keys again in FP32.
#pragma once

#include "kernel.cuh"

namespace evit {

constexpr int kLoadsInFlight = 8;  // loads of K in flight per thread
constexpr int kGroups = 32;  // groups for summing exponentials, independent of the team: candidate n in n mod kGroups

// Scratch memory of a team: q, partial dot products, logits, and results of the groups.
EVIT_HOST_DEVICE inline int score_floats(const EvitClassScoresCall& call, int threads) {
  return divide_up(call.width, 4) * 4 + kLoadsInFlight * threads + call.tokens + kGroups;
}

// Work of a team: the probabilities of one head of one image. A team must be large enough for a whole row of K.
template <class T, int kWidth, class Team>
EVIT_HOST_DEVICE void class_probabilities(const Team& team, const EvitClassScoresCall& call, int image, int head,
                                          float* scratch) {
  using Access = Pack<T, kWidth>;
  const T* q = static_cast<const T*>(call.q) + image * call.q_image + head * call.q_head;
  const T* k = static_cast<const T*>(call.k) + image * call.k_image + head * call.k_head;
  float* query = scratch;
  float* partial = query + divide_up(call.width, 4) * 4;
  float* logits = partial + kLoadsInFlight * team.size();
  float* found = logits + call.tokens;

  // A row of K takes several adjacent accesses; a chunk is what the team loads at once.
  const int accesses = call.width / kWidth, rows = kLoadsInFlight * team.size() / accesses;
  for (int i = team.rank(); i < call.width; i += team.size()) query[i] = to_float(q[i]);
  team.barrier();
  for (int first = 0; first < call.tokens; first += rows) {
    const int here = first + rows < call.tokens ? rows : call.tokens - first, items = here * accesses;
    Access pack[kLoadsInFlight] = {};
    EVIT_UNROLL
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int item = team.rank() + i * team.size();
      if (item < items)
        pack[i] =
            *reinterpret_cast<const Access*>(k + (first + item / accesses) * call.k_token + item % accesses * kWidth);
    }
    EVIT_UNROLL
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int item = team.rank() + i * team.size();
      if (item >= items) break;
      const float* with = query + item % accesses * kWidth;
      float sum = 0.0f;
      EVIT_UNROLL
      for (int j = 0; j < kWidth; ++j) sum = fmaf(pack[i][j], with[j], sum);
      partial[item] = sum;
    }
    team.barrier();
    for (int row = team.rank(); row < here; row += team.size()) {
      float sum = 0.0f;
      for (int access = 0; access < accesses; ++access) sum += partial[row * accesses + access];
      logits[first + row] = sum * call.scale;
    }
    team.barrier();
  }

  for (int group = team.rank(); group < kGroups; group += team.size()) {
    float most = -INFINITY;
    for (int n = group; n < call.tokens; n += kGroups) most = fmaxf(most, logits[n]);
    found[group] = most;
  }
  team.barrier();
  float most = found[0];
  for (int group = 1; group < kGroups; ++group) most = fmaxf(most, found[group]);
  for (int n = team.rank(); n < call.tokens; n += team.size()) logits[n] = expf(logits[n] - most);
  team.barrier();
  for (int group = team.rank(); group < kGroups; group += team.size()) {
    float sum = 0.0f;
    for (int n = group; n < call.tokens; n += kGroups) sum += logits[n];
    found[group] = sum;
  }
  team.barrier();
  float total = 0.0f;
  for (int group = 0; group < kGroups; ++group) total += found[group];
  float* to = call.probabilities + (static_cast<int64_t>(image) * call.heads + head) * call.tokens;
  for (int n = team.rank(); n < call.tokens; n += team.size()) to[n] = logits[n] / total;
}

// The score of one candidate of one image.
EVIT_HOST_DEVICE inline void class_score(const EvitClassScoresCall& call, int64_t index) {
  const int candidates = call.tokens - call.prefix;
  const int64_t image = index / candidates;
  const float* from = call.probabilities + image * call.heads * call.tokens + call.prefix + index % candidates;
  float sum = 0.0f;
  for (int head = 0; head < call.heads; ++head) sum += from[static_cast<int64_t>(head) * call.tokens];
  call.scores[index] = sum / static_cast<float>(call.heads);
}

}  // namespace evit
