// The library that registers its plugin when it is loaded: for Triton, trtexec --staticPlugins, polygraphy, ONNX
// Runtime and dlopen. It links to no TensorRT: it enters itself in the one that the process has already, also where
// that was loaded out of sight of other libraries (RTLD_LOCAL: Triton, and Python's packages).
#include <dlfcn.h>

#include <cstdio>

#include "plugin.h"
#include "token_reorg.h"

namespace {

char refusal[256] = "its initialisation did not run";

// Numbers of TensorRT's releases that may be in a process, to say which one is.
constexpr int kOldestMajor = 8, kNewestMajor = 19;

void* tensorrt_in_process(int major) noexcept {
  char name[32];
  std::snprintf(name, sizeof name, "libnvinfer.so.%d", major);
  return dlopen(name, RTLD_NOW | RTLD_NOLOAD);
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
  void* library = tensorrt_in_process(NV_TENSORRT_MAJOR);
  if (library == nullptr) {
    for (int major = kOldestMajor; major <= kNewestMajor; ++major) {
      if (tensorrt_in_process(major) == nullptr) continue;
      return refuse(
          "the library was built for TensorRT %d, this process has TensorRT %d: build it against that one's "
          "headers",
          NV_TENSORRT_MAJOR, major);
    }
    return refuse("TensorRT (libnvinfer.so.%d) is not in this process: load it first", NV_TENSORRT_MAJOR);
  }
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
