// The library that registers its plugin when it is loaded: for Triton, trtexec --staticPlugins, polygraphy, ONNX
// Runtime and dlopen. It does not link to TensorRT, but registers with the TensorRT that the process has loaded, even
// if with RTLD_LOCAL (as Triton and Python packages do), or else with the one that the dynamic loader finds.
#include <dlfcn.h>

#include <cstdio>

#include "plugin.h"
#include "token_reorg.h"

namespace {

char refusal[256] = "its initialization did not run";

// TensorRT's major versions to look for in the process, to name the one found in messages.
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

// Registers the creator with TensorRT, or writes the reason of a failure to `refusal`.
void enter() noexcept {
  const auto refuse = [](const char* format, auto... values) {
    std::snprintf(refusal, sizeof refusal, format, values...);
  };
  void* library = open_tensorrt(NV_TENSORRT_MAJOR, RTLD_NOLOAD);
  for (int major = kOldestMajor; library == nullptr && major <= kNewestMajor; ++major) {
    if (open_tensorrt(major, RTLD_NOLOAD) == nullptr) continue;
    return refuse("the library was built for TensorRT %d, this process has TensorRT %d", NV_TENSORRT_MAJOR, major);
  }
  // Polygraphy loads plugins before TensorRT. The loader finds the same library that the process will load later.
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

// Returns null if the plugin is registered, else the reason why not.
extern "C" EVIT_EXPORT const char* evit_plugin_refusal(void) noexcept { return refusal[0] == '\0' ? nullptr : refusal; }
