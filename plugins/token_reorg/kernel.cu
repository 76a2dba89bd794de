// The launch on a GPU: one kernel, a block for each team.
#include <cuda_runtime_api.h>

#include "call.h"
#include "kernel.cuh"

namespace evit {
namespace {

struct Block {
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ void barrier() const { __syncthreads(); }
};

constexpr int kMaxThreads = kRowGroups * kMaxLanes;
constexpr int kBlocksToAMultiprocessor = 2;  // at least: more would spill on some architectures

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, kBlocksToAMultiprocessor)
    token_reorg_kernel(const __grid_constant__ EvitTokenReorgCall call, Geometry geometry, int places) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int block = static_cast<int>(blockIdx.x);  // teams of one image side by side: they read the same rows
  token_reorg<T, kWidth>(Block{}, call, block / geometry.tiles, block % geometry.tiles, geometry, shared,
                         reinterpret_cast<int16_t*>(shared + places));
}

template <class T, int kWidth>
cudaError_t launch(const EvitTokenReorgCall& call, cudaStream_t stream, int multiprocessors) {
  const Geometry geometry = choose_geometry(call.batch, divide_up(call.channels, kWidth), multiprocessors);
  const unsigned blocks = static_cast<unsigned>(call.batch) * static_cast<unsigned>(geometry.tiles);
  const unsigned threads = static_cast<unsigned>(geometry.lanes * kRowGroups);
  const int scratch = scratch_bytes(call, geometry.lanes, kWidth);
  const size_t shared = static_cast<size_t>(scratch) + static_cast<size_t>(call.candidates) * sizeof(int16_t);
  static_assert(EVIT_MAX_CANDIDATES * (sizeof(uint64_t) + sizeof(int16_t)) <= 48 * 1024, "more has to be asked for");
  token_reorg_kernel<T, kWidth><<<blocks, threads, shared, stream>>>(call, geometry, scratch);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const EvitTokenReorgCall& call, cudaStream_t stream, int multiprocessors) {
  constexpr int kWhole = 16 / static_cast<int>(sizeof(T));
  return has_whole_accesses(call) ? launch<T, kWhole>(call, stream, multiprocessors)
                                  : launch<T, 1>(call, stream, multiprocessors);
}

cudaError_t start(const EvitTokenReorgCall& call, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  switch (call.dtype) {
    case EVIT_FP32:
      return launch<float>(call, stream, multiprocessors);
    case EVIT_FP16:
      return launch<Half>(call, stream, multiprocessors);
    default:
      return launch<Bfloat16>(call, stream, multiprocessors);
  }
}

}  // namespace
}  // namespace evit

int32_t evit_token_reorg(const EvitTokenReorgCall* call, void* stream, char* message, size_t size) {
  const int32_t status = evit::check_call(call, message, size);
  if (status != EVIT_OK || call->batch == 0) return status;
  const cudaError_t error = evit::start(*call, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return EVIT_OK;
  return evit::refuse(EVIT_CUDA_ERROR, message, size, "TokenReorg: %s (%s)", cudaGetErrorString(error),
                      cudaGetErrorName(error));
}
