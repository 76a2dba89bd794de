// The kernel's code on a CPU, for tests, with a team of threads instead of a block.
#include <barrier>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "call.h"
#include "kernel.cuh"
#include "scores.cuh"

namespace evit {
namespace {

class Threads {
 public:
  Threads(int rank, int size, std::barrier<>& barrier) : rank_(rank), size_(size), barrier_(barrier) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  void barrier() const { barrier_.arrive_and_wait(); }

 private:
  int rank_, size_;
  std::barrier<>& barrier_;
};

// Calls a function for each member of a team.
template <class Body>
void in_team(int threads, Body body) {
  std::barrier<> barrier(threads);
  const auto member = [&](int rank) { body(Threads(rank, threads, barrier)); };
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  for (int rank = 1; rank < threads; ++rank) others.emplace_back(member, rank);
  member(0);
  for (std::thread& other : others) other.join();
}

template <class T, int kWidth>
void run(const EvitTokenReorgCall& call, const EvitCut& cut) {
  constexpr int kMultiprocessors = 108;  // of an A100, to choose the partition as on a GPU
  const Geometry geometry = apply_cut(choose_geometry(call, kWidth, kMultiprocessors), cut);
  const int threads = cut.threads > 0 ? cut.threads : 1;
  // Exact sizes, so that sanitizers detect every out-of-bounds access.
  const auto bytes = static_cast<size_t>(scratch_bytes(call, geometry, kWidth));
  struct alignas(16) Chunk {
    unsigned char bytes[16];
  };
  const std::unique_ptr<Chunk[]> scratch(new Chunk[bytes / sizeof(Chunk)]);
  const std::unique_ptr<Fate[]> fates(new Fate[static_cast<size_t>(call.prefix + call.candidates)]);
  in_team(threads, [&](const Threads& team) {
    for (int image = 0; image < call.batch; ++image) {
      for (int tile = 0; tile < geometry.tiles; ++tile) {
        for (int slice = 0; slice < geometry.slices; ++slice) {
          token_reorg<T, kWidth>(team, call, {image, tile, slice}, geometry, scratch[0].bytes, fates.get());
          team.barrier();  // the next team of the grid reuses the memory
        }
      }
    }
  });
}

template <class T>
void run(const EvitTokenReorgCall& call, const EvitCut& cut) {
  constexpr int kWhole = 16 / static_cast<int>(sizeof(T));
  if (has_whole_accesses(call))
    run<T, kWhole>(call, cut);
  else
    run<T, 1>(call, cut);
}

template <class T>
void run_scores(const EvitClassScoresCall& call, int threads) {
  // A team needs at least enough threads for a whole row of K.
  const int least = divide_up(call.width * static_cast<int>(sizeof(T)), 16 * kLoadsInFlight);
  threads = threads > least ? threads : least;
  const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(score_floats(call, threads))]);
  in_team(threads, [&](const Threads& team) {
    for (int image = 0; image < call.batch; ++image) {
      for (int head = 0; head < call.heads; ++head) {
        class_probabilities<T, 16 / sizeof(T)>(team, call, image, head, scratch.get());
        team.barrier();  // the next team of the grid reuses the memory
      }
    }
    const int64_t count = static_cast<int64_t>(call.batch) * (call.tokens - call.prefix);
    for (int64_t index = team.rank(); index < count; index += team.size()) class_score(call, index);
  });
}

}  // namespace
}  // namespace evit

int32_t evit_token_reorg_on_host(const EvitTokenReorgCall* call, const EvitCut* cut, char* message, size_t size) {
  int32_t status = evit::check_call(call, message, size);
  if (status == EVIT_OK) status = evit::check_cut(cut, false, message, size);
  if (status != EVIT_OK || call->batch == 0) return status;
  switch (call->dtype) {
    case EVIT_FP32:
      evit::run<float>(*call, *cut);
      break;
    case EVIT_FP16:
      evit::run<evit::Half>(*call, *cut);
      break;
    default:
      evit::run<evit::Bfloat16>(*call, *cut);
  }
  return EVIT_OK;
}

int32_t evit_class_scores_on_host(const EvitClassScoresCall* call, int32_t threads, char* message, size_t size) {
  const int32_t status = evit::check_scores(call, message, size);
  if (status != EVIT_OK || call->batch == 0) return status;
  if (threads < 0 || threads > 64)
    return evit::refuse(EVIT_INVALID_CALL, message, size, "ClassScores: threads is %d, expected 0 to 64", threads);
  const int team = threads > 0 ? threads : 1;
  switch (call->dtype) {
    case EVIT_FP32:
      evit::run_scores<float>(*call, team);
      break;
    case EVIT_FP16:
      evit::run_scores<evit::Half>(*call, team);
      break;
    default:
      evit::run_scores<evit::Bfloat16>(*call, team);
  }
  return EVIT_OK;
}
