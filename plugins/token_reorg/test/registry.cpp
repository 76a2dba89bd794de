// Stand-in for libnvinfer in libraries_test.cpp: a registry with TensorRT's symbols that records registrations.
#include <NvInferRuntime.h>

#include <cstring>
#include <vector>

namespace {

class Registry final : public nvinfer1::IPluginRegistry {
 public:
  bool registerCreator(nvinfer1::IPluginCreatorInterface& creator, const char* name_space) noexcept override {
    if (std::strcmp(name_space, "evit") != 0) return false;
    creators_.push_back(&creator);
    return true;
  }
  nvinfer1::IPluginCreatorInterface* getCreator(const char* name, const char* version,
                                                const char* name_space) noexcept override {
    for (auto* creator : creators_) {
      const auto* one = static_cast<nvinfer1::IPluginCreatorV3One*>(creator);
      if (std::strcmp(one->getPluginName(), name) == 0 && std::strcmp(one->getPluginVersion(), version) == 0 &&
          std::strcmp(one->getPluginNamespace(), name_space) == 0)
        return creator;
    }
    return nullptr;
  }
  nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* number) const noexcept override {
    *number = static_cast<int32_t>(creators_.size());
    return creators_.data();
  }
  nvinfer1::IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* number) noexcept override {
    return getAllCreators(number);
  }

  // Not used by plugin libraries.
  void setErrorRecorder(nvinfer1::IErrorRecorder*) noexcept override {}
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool deregisterCreator(const nvinfer1::IPluginCreatorInterface&) noexcept override { return false; }
  nvinfer1::IPluginResource* acquirePluginResource(const char*, nvinfer1::IPluginResource*) noexcept override {
    return nullptr;
  }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(nvinfer1::IPluginCreator&, const char*) noexcept override { return false; }
  nvinfer1::IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  nvinfer1::IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const nvinfer1::IPluginCreator&) noexcept override { return false; }
#endif

 private:
  std::vector<nvinfer1::IPluginCreatorInterface*> creators_;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}

extern "C" __attribute__((visibility("default"))) nvinfer1::ILogger* getLogger() noexcept { return nullptr; }
