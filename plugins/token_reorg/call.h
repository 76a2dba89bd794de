// Code shared by the launchers.
#pragma once

#include <stdarg.h>
#include <stdio.h>

#include "token_reorg.h"

namespace evit {

#if defined(__GNUC__)
__attribute__((format(printf, 4, 5)))
#endif
inline int32_t refuse(int32_t status, char* message, size_t size, const char* format, ...) {
  if (message != nullptr && size > 0) {
    va_list values;
    va_start(values, format);
    vsnprintf(message, size, format, values);
    va_end(values);
  }
  return status;
}

// Checks a call before anything is launched.
inline int32_t check_call(const EvitTokenReorgCall* call, char* message, size_t size) {
  const auto no = [&](const char* what, int value, const char* wanted, int low, int high) {
    return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: %s is %d, expected %s%d to %d", what, value, wanted,
                  low, high);
  };
  if (call == nullptr) return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: the call is a null pointer");
  constexpr int32_t kMost = 1 << 30;
  if (call->dtype < EVIT_FP32 || call->dtype > EVIT_BF16) return no("dtype", call->dtype, "", EVIT_FP32, EVIT_BF16);
  if (call->batch < 0) return no("batch", call->batch, "", 0, kMost);
  if (call->prefix < 0 || call->prefix > EVIT_MAX_PREFIX) return no("prefix", call->prefix, "", 0, EVIT_MAX_PREFIX);
  if (call->candidates < 1 || call->candidates > EVIT_MAX_CANDIDATES)
    return no("the number of candidates", call->candidates, "", 1, EVIT_MAX_CANDIDATES);
  if (call->keep < 1 || call->keep > call->candidates)
    return no("keep", call->keep, "at most the number of candidates, ", 1, call->candidates);
  if (call->fuse != 0 && call->fuse != 1) return no("fuse", call->fuse, "", 0, 1);
  constexpr int32_t kMostChannels = 1 << 20;
  if (call->channels < 1 || call->channels > kMostChannels)
    return no("the number of channels", call->channels, "", 1, kMostChannels);
  if (call->batch == 0) return EVIT_OK;
  const struct {
    const char* name;
    const void* pointer;
    unsigned alignment;
  } tensors[] = {{"x", call->x, call->dtype == EVIT_FP32 ? 4u : 2u},
                 {"scores", call->scores, 4},
                 {"y", call->y, call->dtype == EVIT_FP32 ? 4u : 2u},
                 {"idx", call->idx, 4}};
  for (const auto& tensor : tensors) {
    if (tensor.pointer == nullptr && tensor.pointer == call->idx) continue;  // not requested
    if (tensor.pointer == nullptr)
      return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: %s is a null pointer", tensor.name);
    if (reinterpret_cast<uintptr_t>(tensor.pointer) % tensor.alignment != 0)
      return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: %s is not aligned to its elements of %u bytes",
                    tensor.name, tensor.alignment);
  }
  return EVIT_OK;
}

inline int32_t check_scores(const EvitClassScoresCall* call, char* message, size_t size) {
  const auto no = [&](const char* what, int value, int low, int high) {
    return refuse(EVIT_INVALID_CALL, message, size, "ClassScores: %s is %d, expected %d to %d", what, value, low, high);
  };
  if (call == nullptr) return refuse(EVIT_INVALID_CALL, message, size, "ClassScores: the call is a null pointer");
  constexpr int32_t kMost = 1 << 30, kMostHeads = 1 << 12, kMostTokens = EVIT_MAX_CANDIDATES + EVIT_MAX_PREFIX;
  if (call->dtype < EVIT_FP32 || call->dtype > EVIT_BF16) return no("dtype", call->dtype, EVIT_FP32, EVIT_BF16);
  if (call->batch < 0) return no("batch", call->batch, 0, kMost);
  if (call->heads < 1 || call->heads > kMostHeads) return no("heads", call->heads, 1, kMostHeads);
  if (call->tokens < 1 || call->tokens > kMostTokens) return no("tokens", call->tokens, 1, kMostTokens);
  if (call->prefix < 0 || call->prefix >= call->tokens) return no("prefix", call->prefix, 0, call->tokens - 1);
  const int bytes = call->dtype == EVIT_FP32 ? 4 : 2;
  if (call->width < 1 || call->width > EVIT_MAX_HEAD_WIDTH) return no("width", call->width, 1, EVIT_MAX_HEAD_WIDTH);
  if (call->batch == 0) return EVIT_OK;
  if (call->q == nullptr || call->k == nullptr || call->probabilities == nullptr || call->scores == nullptr)
    return refuse(EVIT_INVALID_CALL, message, size, "ClassScores: q, k, probabilities or scores is a null pointer");
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(call->q) | reinterpret_cast<uintptr_t>(call->k);
  const int64_t strides = call->q_image | call->q_head | call->k_image | call->k_token | call->k_head | call->width;
  if (addresses % 16 != 0 || strides * bytes % 16 != 0)
    return refuse(EVIT_INVALID_CALL, message, size,
                  "ClassScores: q, k, a stride or the width is off the grid of 16 bytes");
  return EVIT_OK;
}

// `on_gpu`: whether a team is a block, for which the kernel is compiled in two sizes, or a group of CPU threads.
inline int32_t check_cut(const EvitCut* cut, bool on_gpu, char* message, size_t size) {
  if (cut == nullptr) return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: the cut is a null pointer");
  if (cut->lanes < 0 || cut->lanes > EVIT_MAX_LANES || (cut->lanes & (cut->lanes - 1)) != 0)
    return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: lanes is %d, expected a power of two up to %d",
                  cut->lanes, EVIT_MAX_LANES);
  constexpr int32_t kMostTiles = 1 << 20;
  if (cut->tiles < 0 || cut->tiles > kMostTiles)
    return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: tiles is %d, expected 0 to %d", cut->tiles,
                  kMostTiles);
  if (cut->slices < 0 || cut->slices > EVIT_MAX_SLICES)
    return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: slices is %d, expected 0 to %d", cut->slices,
                  EVIT_MAX_SLICES);
  if (cut->early < 0 || cut->early > 2)
    return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: early is %d, expected 0 to 2", cut->early);
  if (on_gpu && cut->threads != 0 && cut->threads != 256 && cut->threads != 512)
    return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: threads is %d, expected 0, 256 or 512", cut->threads);
  if (!on_gpu && (cut->threads < 0 || cut->threads > 64))
    return refuse(EVIT_INVALID_CALL, message, size, "TokenReorg: threads is %d, expected 0 to 64", cut->threads);
  return EVIT_OK;
}

}  // namespace evit
