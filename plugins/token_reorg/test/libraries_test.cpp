// The two plugin libraries, loaded as their users load them.
//
//   libraries_test registers LIBRARY TENSORRT   TensorRT is loaded with RTLD_LOCAL
//   libraries_test twice LIBRARY TENSORRT COPY  a copy of the library is already registered
//   libraries_test alone LIBRARY                TensorRT is neither loaded nor found by the loader
//   libraries_test found LIBRARY                TensorRT is not loaded, and the loader finds it
//   libraries_test other LIBRARY TENSORRT       another major version of TensorRT is loaded
//   libraries_test creators LIBRARY             what IPluginRegistry::loadLibrary does
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "checks.h"
#include "token_reorg.h"

namespace {

void* load(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(EXIT_FAILURE);
  }
  return library;
}

template <class Function>
Function* symbol(void* library, const char* name) {
  auto* found = reinterpret_cast<Function*>(dlsym(library, name));
  if (found == nullptr) {
    std::fprintf(stderr, "no symbol %s\n", name);
    std::exit(EXIT_FAILURE);
  }
  return found;
}

void check_version(void* library) {
  CHECK(symbol<int32_t()>(library, "evit_token_reorg_abi")() == EVIT_TOKEN_REORG_ABI);
  CHECK(symbol<int32_t()>(library, "evit_plugin_tensorrt_version")() == NV_TENSORRT_VERSION);
  const std::string identity = symbol<const char*()>(library, "evit_library_identity")();
  CHECK(identity.find("evit-deploy library: ") == 0);
  CHECK(identity.find(" tensorrt=" + std::to_string(NV_TENSORRT_MAJOR) + ".") != std::string::npos);
}

void check_plugin(nvinfer1::IPluginCreatorInterface* found) {
  CHECK(found != nullptr);
  auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(found);
  CHECK(std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
  const int32_t value = 1;
  nvinfer1::PluginField fields[3];
  for (int i = 0; i < 3; ++i)
    fields[i] = {creator->getFieldNames()->fields[i].name, &value, nvinfer1::PluginFieldType::kINT32, 1};
  nvinfer1::PluginFieldCollection collection;
  collection.nbFields = 3;
  collection.fields = fields;
  nvinfer1::IPluginV3* plugin = creator->createPlugin("reorg", &collection, nvinfer1::TensorRTPhase::kBUILD);
  CHECK(plugin != nullptr);
  delete plugin;
}

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity, const char* message) noexcept override { last = message; }
  std::string last;
};

class Finder final : public nvinfer1::ILoggerFinder {
 public:
  nvinfer1::ILogger* findLogger() override { return &logger; }
  Logger logger;
};

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 2 ? arguments[1] : "";
  const auto refusal_of = [](void* library) { return symbol<const char*()>(library, "evit_plugin_refusal")(); };
  if (what == "registers" || what == "twice") {
    void* tensorrt = load(arguments[3]);
    void* library = load(arguments[2]);
    CHECK(refusal_of(library) == nullptr);
    check_version(library);
    auto* registry = symbol<nvinfer1::IPluginRegistry*()>(tensorrt, "getPluginRegistry")();
    check_plugin(registry->getCreator("TokenReorg", "1", "evit"));
    int32_t number = 0;
    registry->getAllCreators(&number);
    CHECK(number == 1);
    if (what == "twice") {
      const char* refusal = refusal_of(load(arguments[4]));
      CHECK(refusal != nullptr && std::strstr(refusal, "registered evit::TokenReorg 1 already") != nullptr);
      registry->getAllCreators(&number);
      CHECK(number == 1);
    }
    dlclose(library);  // it stays: the registry points into it
    check_plugin(registry->getCreator("TokenReorg", "1", "evit"));
  } else if (what == "alone") {
    const char* refusal = refusal_of(load(arguments[2]));
    CHECK(refusal != nullptr && std::strstr(refusal, "is not in this process and was not found") != nullptr);
  } else if (what == "found") {
    void* library = load(arguments[2]);
    CHECK(refusal_of(library) == nullptr);
    const std::string name = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    auto* registry = symbol<nvinfer1::IPluginRegistry*()>(load(name.c_str()), "getPluginRegistry")();
    check_plugin(registry->getCreator("TokenReorg", "1", "evit"));
  } else if (what == "other") {
    load(arguments[3]);
    const char* refusal = refusal_of(load(arguments[2]));
    const std::string built = "was built for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + ", this process has";
    CHECK(refusal != nullptr && std::strstr(refusal, built.c_str()) != nullptr);
  } else if (what == "creators") {
    void* library = load(arguments[2]);
    check_version(library);
    CHECK(dlsym(library, "evit_plugin_refusal") == nullptr);
    Finder finder;
    symbol<void(nvinfer1::ILoggerFinder*)>(library, "setLoggerFinder")(&finder);
    int32_t number = 0;
    auto* const* creators = symbol<nvinfer1::IPluginCreatorInterface* const*(int32_t&)>(library, "getCreators")(number);
    CHECK(number == 1);
    check_plugin(creators[0]);
    auto* creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]);
    CHECK(creator->createPlugin("reorg", nullptr, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
    CHECK(finder.logger.last.find("null pointer") != std::string::npos);
  } else {
    std::fprintf(stderr, "see the top of %s\n", __FILE__);
    return 2;
  }
  checks::finish();
}
