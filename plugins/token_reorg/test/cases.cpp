// Reads calls of the op from standard input and writes the results to standard output, for
// tests/tokens/operators/test_kernel.py, which compares them with the oracle. Every buffer has its exact size, so that
// a sanitizer (compute-sanitizer in the build for a GPU) detects every out-of-bounds access.
//
// A call is a Header, x and scores; the result is a status and, if it is EVIT_OK, y and idx.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "token_reorg.h"

#ifdef EVIT_ON_GPU
#include <cuda_runtime_api.h>
#endif

namespace {

struct Header {
  EvitTokenReorgCall call;  // pointers ignored
  int32_t offset;           // offset of x and y in elements from an address aligned to 16 bytes
  EvitCut cut;
};

bool read_all(void* to, size_t size) { return std::fread(to, 1, size, stdin) == size; }

void write_all(const void* from, size_t size) {
  if (std::fwrite(from, 1, size, stdout) != size) std::exit(EXIT_FAILURE);
}

// Memory where the op runs, filled with a pattern to detect elements that are not written.
class Buffer {
 public:
  explicit Buffer(size_t size, size_t offset = 0) : size_(size), offset_(offset) {
#ifdef EVIT_ON_GPU
    check(cudaMalloc(&memory_, size + offset + 1));
    check(cudaMemset(memory_, 0xa5, size + offset + 1));
#else
    memory_ = std::aligned_alloc(16, (size + offset + 15) / 16 * 16);
    // The allocation ends with the tensor, rounded up to 16 bytes as aligned_alloc requires.
    if (memory_ == nullptr) std::exit(EXIT_FAILURE);
    std::memset(memory_, 0xa5, size + offset);
#endif
  }
  ~Buffer() {
#ifdef EVIT_ON_GPU
    cudaFree(memory_);
#else
    std::free(memory_);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return static_cast<char*>(memory_) + offset_; }

  bool read() const {
#ifdef EVIT_ON_GPU
    const std::unique_ptr<char[]> bytes(new char[size_]);
    if (!read_all(bytes.get(), size_)) return false;
    check(cudaMemcpy(data(), bytes.get(), size_, cudaMemcpyHostToDevice));
    return true;
#else
    return read_all(data(), size_);
#endif
  }

  void write() const {
#ifdef EVIT_ON_GPU
    const std::unique_ptr<char[]> bytes(new char[size_]);
    check(cudaMemcpy(bytes.get(), data(), size_, cudaMemcpyDeviceToHost));
    write_all(bytes.get(), size_);
#else
    write_all(data(), size_);
#endif
  }

#ifdef EVIT_ON_GPU
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    std::exit(EXIT_FAILURE);
  }
#endif

 private:
  void* memory_ = nullptr;
  size_t size_, offset_;
};

}  // namespace

int main() {
  Header header;
  while (read_all(&header, sizeof header)) {
    EvitTokenReorgCall& call = header.call;
    const size_t width = call.dtype == EVIT_FP32 ? 4 : 2;
    const auto product = [](int32_t a, int64_t b, int64_t c, size_t size) {
      return static_cast<size_t>(a) * static_cast<size_t>(b) * static_cast<size_t>(c) * size;
    };
    const size_t offset = static_cast<size_t>(header.offset) * width;
    const Buffer x(product(call.batch, int64_t{call.prefix} + call.candidates, call.channels, width), offset);
    const Buffer scores(product(call.batch, call.candidates, 1, sizeof(float)));
    const Buffer y(product(call.batch, int64_t{call.prefix} + call.keep + call.fuse, call.channels, width), offset);
    const Buffer idx(product(call.batch, call.keep, 1, sizeof(int32_t)));
    if (!x.read() || !scores.read()) return EXIT_FAILURE;
    call.x = x.data();
    call.scores = static_cast<const float*>(scores.data());
    call.y = y.data();
    call.idx = static_cast<int32_t*>(idx.data());
    char message[256] = "";
#ifdef EVIT_ON_GPU
    const int32_t status = evit_token_reorg_cut(&call, &header.cut, nullptr, message, sizeof message);
    Buffer::check(cudaDeviceSynchronize());
#else
    const int32_t status = evit_token_reorg_on_host(&call, &header.cut, message, sizeof message);
#endif
    write_all(&status, sizeof status);
    if (status == EVIT_OK) {
      y.write();
      idx.write();
    } else {
      std::fprintf(stderr, "%s\n", message);
    }
  }
  return std::ferror(stdin) ? EXIT_FAILURE : EXIT_SUCCESS;
}
