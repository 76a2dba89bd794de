// The library that registers its plugin when it is loaded: for Triton, trtexec --staticPlugins, polygraphy, ONNX
// Runtime and dlopen. It links to no TensorRT: it enters itself in the one that the process has already, also where
// that was loaded out of sight of other libraries (RTLD_LOCAL: Triton, and Python's packages), or in the one that the
// loader finds.
#include <dlfcn.h>

#include <cstdio>

#include "plugin.h"
#include "token_reorg.h"

namespace {

char refusal[256] = "its initialization did not run";

// Numbers of TensorRT's releases that may be in a process, to say which one is.
constexpr int kOldestMajor = 8, kNewestMajor = 19;

void* open_tensorrt(int major, int flags) noexcept {
  char name[32];
  std::snprintf(name, sizeof name, "libnvinfer.so.%d", major);
  return dlopen(name, RTLD_NOW | flags);
}

template <class Function>
Function* symbol(void* library, const char* name) noexcept {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

evit::TokenReorgCreator& creator() noexcept {
  static evit::TokenReorgCreator instance;
  return instance;
}

// Enters the creator in TensorRT's registry, or says in `refusal` why it did not.
void enter() noexcept {
  const auto refuse = [](const char* format, auto... values) {
    std::snprintf(refusal, sizeof refusal, format, values...);
  };
  void* library = open_tensorrt(NV_TENSORRT_MAJOR, RTLD_NOLOAD);
  for (int major = kOldestMajor; library == nullptr && major <= kNewestMajor; ++major) {
    if (open_tensorrt(major, RTLD_NOLOAD) == nullptr) continue;
    return refuse("the library was built for TensorRT %d, this process has TensorRT %d", NV_TENSORRT_MAJOR, major);
  }
  // Polygraphy loads plugins first. What the loader finds is what the process will have, as if we were linked to it.
  if (library == nullptr) library = open_tensorrt(NV_TENSORRT_MAJOR, RTLD_LOCAL);
  if (library == nullptr)
    return refuse(
        "TensorRT (libnvinfer.so.%d) is not in this process and was not found: load it first, or name its "
        "folder in LD_LIBRARY_PATH",
        NV_TENSORRT_MAJOR);
  const auto get_registry = symbol<nvinfer1::IPluginRegistry*()>(library, "getPluginRegistry");
  nvinfer1::IPluginRegistry* registry = get_registry == nullptr ? nullptr : get_registry();
  if (registry == nullptr) return refuse("libnvinfer.so.%d has no plugin registry", NV_TENSORRT_MAJOR);
  evit::set_logger(symbol<nvinfer1::ILogger*()>(library, "getLogger"));
  if (registry->getCreator(evit::kPluginName, evit::kPluginVersion, evit::kPluginNamespace) != nullptr)
    return refuse("another library has registered %s::%s %s already", evit::kPluginNamespace, evit::kPluginName,
                  evit::kPluginVersion);
  if (!registry->registerCreator(creator(), evit::kPluginNamespace)) return refuse("TensorRT's registry refused it");
  refusal[0] = '\0';
}

[[gnu::constructor]] void on_load() noexcept {
  enter();
  if (refusal[0] != '\0') std::fprintf(stderr, "evit::TokenReorg was not registered: %s\n", refusal);
}

}  // namespace

// Null when the plugin is registered, else why it is not.
extern "C" EVIT_EXPORT const char* evit_plugin_refusal(void) noexcept { return refusal[0] == '\0' ? nullptr : refusal; }
