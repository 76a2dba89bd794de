// The library for loading by TensorRT: IPluginRegistry::loadLibrary, trtexec --dynamicPlugins, and libraries embedded
// in a plan (setPluginsToSerialize). It must not register itself, or TensorRT would refuse it.
#include <atomic>

#include "plugin.h"
#include "token_reorg.h"

namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  return finder == nullptr ? nullptr : finder->findLogger();
}

}  // namespace

extern "C" EVIT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  logger_finder = finder;
  evit::set_logger(find_logger);
}

extern "C" EVIT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& number) {
  static evit::TokenReorgCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  number = 1;
  return creators;
}
