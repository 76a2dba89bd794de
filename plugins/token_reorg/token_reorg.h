// C interface of evit::TokenReorg, used by C++ programs, Python (ctypes) and the TensorRT plugin.
//
//   y, idx = TokenReorg(x, scores)
//
// Keeps the K of N candidates with the highest scores, in descending order, lowest index first on ties. y contains the
// prefix rows, the kept rows and, with fuse, the sum of score * row over the other candidates (EViT, equation 3).
#pragma once

#include <stddef.h>
#include <stdint.h>

#define EVIT_TOKEN_REORG_ABI 2  // version of this header; evit_token_reorg_abi() returns the library's
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
  EVIT_INVALID_CALL = 1,  // invalid arguments; nothing was launched
  EVIT_CUDA_ERROR = 2     // a CUDA call failed
};

// Arguments of one call. All tensors are dense and row-major, in memory of the current device; outputs must not overlap
// other tensors.
typedef struct EvitTokenReorgCall {
  const void* x;        // [batch, prefix + candidates, channels]
  const float* scores;  // [batch, candidates]
  void* y;              // [batch, prefix + keep + fuse, channels], in x's type
  int32_t* idx;         // [batch, keep], 0-based indices of candidates; NULL if not requested
  int32_t dtype;        // EvitDtype of x and y
  int32_t batch;        // 0 is allowed and does nothing
  int32_t prefix;       // leading rows that are always kept, 0 to EVIT_MAX_PREFIX
  int32_t candidates;   // N, 1 to EVIT_MAX_CANDIDATES
  int32_t channels;     // C
  int32_t keep;         // K, 1 to N
  int32_t fuse;         // 0 or 1
} EvitTokenReorgCall;

// Launches the kernel on a stream (cudaStream_t, NULL for the default one) and does not wait for it. It makes a single
// launch, without allocation or synchronization, so it can be captured in a CUDA graph. The results are bit-identical
// on every run, in every batch and on every device, as long as no score is NaN.
//
// Returns an EvitStatus. On failure `message` (if not NULL) receives an error message of up to `size` bytes,
// NUL-terminated.
EVIT_EXPORT int32_t evit_token_reorg(const EvitTokenReorgCall* call, void* stream, char* message, size_t size);

// Partition of the work. It does not affect the results. 0 lets the kernel choose a value.
typedef struct EvitCut {
  int32_t lanes;    // adjacent accesses of a team, a power of two, 1 to EVIT_MAX_LANES
  int32_t tiles;    // teams that share an image's columns
  int32_t slices;   // teams that share a tile's rows, 1 to EVIT_MAX_SLICES; with fuse the first only sums the fused row
  int32_t early;    // 1: load rows after ranking; 2: load the first rows before
  int32_t threads;  // threads of a team: 256 or 512 on a GPU, 1 to 64 on the CPU
} EvitCut;

// The same with a given partition, for benchmarks and tests.
EVIT_EXPORT int32_t evit_token_reorg_cut(const EvitTokenReorgCall* call, const EvitCut* cut, void* stream,
                                         char* message, size_t size);

// The same on the CPU, with a team of threads (by default one) instead of a block, to test the kernel's code without a
// GPU. Only the host library has this function, and it has none of the others.
EVIT_EXPORT int32_t evit_token_reorg_on_host(const EvitTokenReorgCall* call, const EvitCut* cut, char* message,
                                             size_t size);

// EViT's scores (equation 2): softmax of q · Kᵀ · scale over all tokens, then the mean over heads for each candidate.
// Strides are in elements; the elements of a head are contiguous and aligned to 16 bytes.
typedef struct EvitClassScoresCall {
  const void* q;                                      // query of the class token, [batch, heads, width]
  const void* k;                                      // [batch, tokens, heads, width], in q's type
  float* probabilities;                               // [batch, heads, tokens], dense: output of the softmax
  float* scores;                                      // [batch, tokens - prefix], dense
  int64_t q_image, q_head, k_image, k_token, k_head;  // strides
  int32_t dtype;                                      // EvitDtype of q and k
  int32_t batch;                                      // 0 is allowed and does nothing
  int32_t heads;
  int32_t tokens;  // 1 to EVIT_MAX_CANDIDATES + EVIT_MAX_PREFIX
  int32_t width;   // d, up to EVIT_MAX_HEAD_WIDTH, of a multiple of 16 bytes
  int32_t prefix;  // leading tokens that are not candidates, fewer than tokens
  float scale;
} EvitClassScoresCall;

// Launches two kernels on a stream and does not wait. They do not allocate and can be captured in a CUDA graph.
EVIT_EXPORT int32_t evit_class_scores(const EvitClassScoresCall* call, void* stream, char* message, size_t size);

// The same on the CPU, with a team of threads (0: the minimum).
EVIT_EXPORT int32_t evit_class_scores_on_host(const EvitClassScoresCall* call, int32_t threads, char* message,
                                              size_t size);

EVIT_EXPORT int32_t evit_token_reorg_abi(void);

// Identity of the library as one line, which can also be read from the file without loading it.
EVIT_EXPORT const char* evit_library_identity(void);

#ifdef __cplusplus
}
#endif
