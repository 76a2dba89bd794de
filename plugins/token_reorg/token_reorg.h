// evit::TokenReorg behind a C interface, so that C++, Python (ctypes) and the TensorRT plugin call the same thing.
//
//   y, idx = TokenReorg(x, scores)
//
// Of N candidates the K with the highest scores stay, in descending order, the lowest index first on ties. y holds the
// prefix rows, the kept rows and, with fuse, the sum of score * row over the rest: EViT, equation 3.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define EVIT_TOKEN_REORG_ABI 2  // of this header; evit_token_reorg_abi() says the library's
#define EVIT_MAX_CANDIDATES 4096
#define EVIT_MAX_PREFIX 8
#define EVIT_MAX_LANES 32
#define EVIT_MAX_HEAD_WIDTH 256
#define EVIT_MAX_SLICES 64

#if defined(_WIN32)
#define EVIT_EXPORT __declspec(dllexport)
#else
#define EVIT_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum EvitDtype { EVIT_FP32 = 0, EVIT_FP16 = 1, EVIT_BF16 = 2 };

enum EvitStatus {
  EVIT_OK = 0,
  EVIT_INVALID_CALL = 1,  // the call is at fault: nothing was started
  EVIT_CUDA_ERROR = 2     // CUDA refused
};

// One call. All tensors are dense, row by row, in the memory of the current device; y and idx overlap nothing.
typedef struct EvitTokenReorgCall {
  const void* x;        // [batch, prefix + candidates, channels]
  const float* scores;  // [batch, candidates]
  void* y;              // [batch, prefix + keep + fuse, channels], in x's type
  int32_t* idx;         // [batch, keep], numbers of candidates from 0; NULL if they are not wanted
  int32_t dtype;        // EvitDtype of x and y
  int32_t batch;        // 0 is allowed, and does nothing
  int32_t prefix;       // rows in front that always stay, 0 to EVIT_MAX_PREFIX
  int32_t candidates;   // N, 1 to EVIT_MAX_CANDIDATES
  int32_t channels;     // C
  int32_t keep;         // K, 1 to N
  int32_t fuse;         // 0 or 1
} EvitTokenReorgCall;

// Starts the kernel on a stream (cudaStream_t, NULL for the default one) and does not wait for it. One launch, no
// allocation, no synchronization: it may be captured in a CUDA graph. The same call gives the same bits on every run,
// in every batch and on every device, as long as no score is NaN.
//
// Returns an EvitStatus. On failure `message` (if not NULL) receives up to `size` bytes of what was wrong,
// NUL-terminated.
EVIT_EXPORT int32_t evit_token_reorg(const EvitTokenReorgCall* call, void* stream, char* message, size_t size);

// How the work is shared out. No choice changes a bit of the result. 0 leaves a choice to the kernel.
typedef struct EvitCut {
  int32_t lanes;    // accesses side by side in a team, a power of two, 1 to EVIT_MAX_LANES
  int32_t tiles;    // teams that share an image's columns
  int32_t slices;   // teams that share a tile's rows, 1 to EVIT_MAX_SLICES; with a fused row the first only adds it up
  int32_t early;    // 1: rows are loaded when it is known which stay; 2: the first are loaded before
  int32_t threads;  // of a team: 256 or 512 on a GPU, 1 to 64 on the CPU
} EvitCut;

// The same with the cut given, for benchmarks and tests.
EVIT_EXPORT int32_t evit_token_reorg_cut(const EvitTokenReorgCall* call, const EvitCut* cut, void* stream,
                                         char* message, size_t size);

// The same on the CPU, by a team of threads (by default one) in place of a block: the kernel's own code, to be tested
// without a GPU. Only the host library has it, and it has none of the others.
EVIT_EXPORT int32_t evit_token_reorg_on_host(const EvitTokenReorgCall* call, const EvitCut* cut, char* message,
                                             size_t size);

// The scores that EViT ranks by (equation 2): softmax of q · Kᵀ · scale over all tokens, the mean over heads of the
// candidates' columns. Strides are in elements; a head's d elements lie side by side, on a grid of 16 bytes.
typedef struct EvitClassScoresCall {
  const void* q;         // of the class token: [batch, heads, width]
  const void* k;         // [batch, tokens, heads, width], in q's type
  float* probabilities;  // [batch, heads, tokens], dense: the softmax, which is written too
  float* scores;         // [batch, tokens - prefix], dense
  int64_t q_image, q_head, k_image, k_token, k_head;  // strides
  int32_t dtype;                                      // EvitDtype of q and k
  int32_t batch;                                      // 0 is allowed, and does nothing
  int32_t heads;
  int32_t tokens;  // 1 to EVIT_MAX_CANDIDATES + EVIT_MAX_PREFIX
  int32_t width;   // d, up to EVIT_MAX_HEAD_WIDTH, of a multiple of 16 bytes
  int32_t prefix;  // columns in front that are no candidates, fewer than tokens
  float scale;
} EvitClassScoresCall;

// Starts two kernels on a stream, and does not wait. They allocate nothing and may be captured in a CUDA graph.
EVIT_EXPORT int32_t evit_class_scores(const EvitClassScoresCall* call, void* stream, char* message, size_t size);

// The same on the CPU, by a team of threads (0: as few as will do).
EVIT_EXPORT int32_t evit_class_scores_on_host(const EvitClassScoresCall* call, int32_t threads, char* message,
                                              size_t size);

EVIT_EXPORT int32_t evit_token_reorg_abi(void);

// What the library is, as one line; the same line can be read from the file without loading it.
EVIT_EXPORT const char* evit_library_identity(void);

#ifdef __cplusplus
}
#endif
