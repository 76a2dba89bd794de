// Identity of this library, as a line that can be read from the file before loading it, so before its code runs.
#include "token_reorg.h"

#define EVIT_TEXT_(value) #value
#define EVIT_TEXT(value) EVIT_TEXT_(value)

namespace {
// kind: kernel, host, registers or creators. architectures: CUDA's. tensorrt: version of the headers, or none.
const char kIdentity[] =
    "evit-deploy library: kind=" EVIT_KIND " version=" EVIT_VERSION
    " abi=" EVIT_TEXT(EVIT_TOKEN_REORG_ABI) " architectures=" EVIT_ARCHITECTURES " tensorrt=" EVIT_TENSORRT_VERSION ";";
}  // namespace

extern "C" EVIT_EXPORT const char* evit_library_identity(void) { return kIdentity; }

extern "C" EVIT_EXPORT int32_t evit_token_reorg_abi(void) { return EVIT_TOKEN_REORG_ABI; }

#ifdef EVIT_TENSORRT_MAJOR
// Version of the TensorRT headers it was built with: major * 10000 + minor * 100 + patch.
extern "C" EVIT_EXPORT int32_t evit_plugin_tensorrt_version(void) {
  return EVIT_TENSORRT_MAJOR * 10000 + EVIT_TENSORRT_MINOR * 100 + EVIT_TENSORRT_PATCH;
}
#endif
