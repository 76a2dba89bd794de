// The launch on a GPU: one kernel, with a block for each team.
#include <cuda_runtime_api.h>

#include "call.h"
#include "kernel.cuh"
#include "scores.cuh"

namespace evit {
namespace {

struct Block {
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ void barrier() const { __syncthreads(); }
};

// With many images, registers are limited to 80 per thread so that more blocks fit on a multiprocessor; with few
// images, a block may use as many as it needs.
template <class T, int kWidth, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == kNarrowBlock ? 3 : 1)
    token_reorg_kernel(const __grid_constant__ EvitTokenReorgCall call, Geometry geometry, int fates) {
  extern __shared__ __align__(16) unsigned char shared[];
  // Teams of one image are adjacent, because they read the same rows.
  const int block = static_cast<int>(blockIdx.x), team = block / geometry.slices;
  const Share share{team / geometry.tiles, team % geometry.tiles, block % geometry.slices};
  token_reorg<T, kWidth>(Block{}, call, share, geometry, shared, reinterpret_cast<Fate*>(shared + fates));
}

template <class T, int kWidth>
cudaError_t launch(const EvitTokenReorgCall& call, const EvitCut& cut, cudaStream_t stream, int multiprocessors) {
  const Geometry geometry = apply_cut(choose_geometry(call, kWidth, multiprocessors), cut);
  const int64_t blocks = static_cast<int64_t>(call.batch) * geometry.tiles * geometry.slices;
  const int scratch = scratch_bytes(call, geometry, kWidth);
  const size_t shared =
      static_cast<size_t>(scratch) + static_cast<size_t>(call.prefix + call.candidates) * sizeof(Fate);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = geometry.threads == kNarrowBlock ? token_reorg_kernel<T, kWidth, kNarrowBlock>
                                                       : token_reorg_kernel<T, kWidth, kWideBlock>;
  constexpr size_t kUnasked = 48 * 1024;  // shared memory above this must be requested
  if (shared > kUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(geometry.threads), shared, stream>>>(call, geometry,
                                                                                                     scratch);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const EvitTokenReorgCall& call, const EvitCut& cut, cudaStream_t stream, int multiprocessors) {
  constexpr int kWhole = 16 / static_cast<int>(sizeof(T));
  return has_whole_accesses(call) ? launch<T, kWhole>(call, cut, stream, multiprocessors)
                                  : launch<T, 1>(call, cut, stream, multiprocessors);
}

cudaError_t start(const EvitTokenReorgCall& call, const EvitCut& cut, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  switch (call.dtype) {
    case EVIT_FP32:
      return launch<float>(call, cut, stream, multiprocessors);
    case EVIT_FP16:
      return launch<Half>(call, cut, stream, multiprocessors);
    default:
      return launch<Bfloat16>(call, cut, stream, multiprocessors);
  }
}

constexpr int kScoreThreads = 256;

template <class T>
__global__ void __launch_bounds__(kScoreThreads)
    class_probabilities_kernel(const __grid_constant__ EvitClassScoresCall call) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int block = static_cast<int>(blockIdx.x);
  class_probabilities<T, 16 / sizeof(T)>(Block{}, call, block / call.heads, block % call.heads,
                                         reinterpret_cast<float*>(shared));
}

__global__ void class_scores_kernel(const __grid_constant__ EvitClassScoresCall call, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < count) class_score(call, index);
}

template <class T>
cudaError_t launch_scores(const EvitClassScoresCall& call, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(call.batch) * call.heads;
  const int64_t count = static_cast<int64_t>(call.batch) * (call.tokens - call.prefix);
  if (blocks > INT32_MAX || count > INT32_MAX) return cudaErrorInvalidConfiguration;
  const size_t shared = static_cast<size_t>(score_floats(call, kScoreThreads)) * sizeof(float);
  static_assert(
      (EVIT_MAX_HEAD_WIDTH + kLoadsInFlight * kScoreThreads + EVIT_MAX_CANDIDATES + EVIT_MAX_PREFIX + kGroups) *
              sizeof(float) <=
          48 * 1024,
      "more has to be asked for");
  class_probabilities_kernel<T><<<static_cast<unsigned>(blocks), kScoreThreads, shared, stream>>>(call);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const unsigned last = static_cast<unsigned>((count + kScoreThreads - 1) / kScoreThreads);
  class_scores_kernel<<<last, kScoreThreads, 0, stream>>>(call, count);
  return cudaGetLastError();
}

}  // namespace
}  // namespace evit

int32_t evit_class_scores(const EvitClassScoresCall* call, void* stream, char* message, size_t size) {
  const int32_t status = evit::check_scores(call, message, size);
  if (status != EVIT_OK || call->batch == 0) return status;
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = call->dtype == EVIT_FP32   ? evit::launch_scores<float>(*call, on)
                            : call->dtype == EVIT_FP16 ? evit::launch_scores<evit::Half>(*call, on)
                                                       : evit::launch_scores<evit::Bfloat16>(*call, on);
  if (error == cudaSuccess) return EVIT_OK;
  return evit::refuse(EVIT_CUDA_ERROR, message, size, "ClassScores: %s (%s)", cudaGetErrorString(error),
                      cudaGetErrorName(error));
}

int32_t evit_token_reorg_cut(const EvitTokenReorgCall* call, const EvitCut* cut, void* stream, char* message,
                             size_t size) {
  int32_t status = evit::check_call(call, message, size);
  if (status == EVIT_OK) status = evit::check_cut(cut, true, message, size);
  if (status != EVIT_OK || call->batch == 0) return status;
  const cudaError_t error = evit::start(*call, *cut, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return EVIT_OK;
  return evit::refuse(EVIT_CUDA_ERROR, message, size, "TokenReorg: %s (%s)", cudaGetErrorString(error),
                      cudaGetErrorName(error));
}

int32_t evit_token_reorg(const EvitTokenReorgCall* call, void* stream, char* message, size_t size) {
  constexpr EvitCut kOwnChoice{};
  return evit_token_reorg_cut(call, &kOwnChoice, stream, message, size);
}
