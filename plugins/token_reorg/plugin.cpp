#include "plugin.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

#include "token_reorg.h"

namespace evit {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr int32_t kFailed = 1;
constexpr int32_t kInputs = 2, kOutputs = 2;

std::atomic<FindLogger> find_logger{nullptr};

[[gnu::format(printf, 1, 2)]] void report(const char* format, ...) noexcept {
  char message[512];
  const int start = std::snprintf(message, sizeof message, "evit::TokenReorg: ");
  va_list values;
  va_start(values, format);
  std::vsnprintf(message + start, sizeof message - static_cast<size_t>(start), format, values);
  va_end(values);
  const FindLogger find = find_logger.load();
  nvinfer1::ILogger* logger = find == nullptr ? nullptr : find();
  if (logger != nullptr)
    logger->log(nvinfer1::ILogger::Severity::kERROR, message);
  else
    std::fprintf(stderr, "%s\n", message);
}

struct Named {
  const char* name;
  int32_t Attributes::* value;
  int32_t low, high;
};
constexpr Named kAttributes[] = {{"keep", &Attributes::keep, 1, EVIT_MAX_CANDIDATES},
                                 {"fuse", &Attributes::fuse, 0, 1},
                                 {"prefix", &Attributes::prefix, 0, EVIT_MAX_PREFIX}};

bool has_numbers(int32_t inputs, int32_t outputs) noexcept {
  if (inputs == kInputs && outputs == kOutputs) return true;
  report("%d inputs and %d outputs, expected x, scores and y, idx", inputs, outputs);
  return false;
}

// The kernel's type for x; -1 if it is not supported.
int32_t dtype_of(DataType type) noexcept {
  switch (type) {
    case DataType::kFLOAT:
      return EVIT_FP32;
    case DataType::kHALF:
      return EVIT_FP16;
    case DataType::kBF16:
      return EVIT_BF16;
    default:
      return -1;
  }
}

}  // namespace

void set_logger(FindLogger find) { find_logger = find; }

// ---- plugin

TokenReorgPlugin::TokenReorgPlugin(const Attributes& attributes) noexcept : attributes_(attributes) {
  for (int i = 0; i < 3; ++i)
    serialized_[i] = PluginField(kAttributes[i].name, &(attributes_.*kAttributes[i].value), PluginFieldType::kINT32, 1);
  fields_.nbFields = 3;
  fields_.fields = serialized_;
}

nvinfer1::IPluginCapability* TokenReorgPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* TokenReorgPlugin::clone() noexcept { return new (std::nothrow) TokenReorgPlugin(*this); }

nvinfer1::IPluginV3* TokenReorgPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

int32_t TokenReorgPlugin::getOutputDataTypes(DataType* output_types, int32_t outputs, const DataType* input_types,
                                             int32_t inputs) const noexcept {
  if (output_types == nullptr || input_types == nullptr || !has_numbers(inputs, outputs)) return kFailed;
  if (dtype_of(input_types[0]) < 0 || input_types[1] != DataType::kFLOAT) {
    report("x of type %d and scores of type %d (nvinfer1::DataType), expected FP32, FP16 or BF16, and FP32",
           static_cast<int>(input_types[0]), static_cast<int>(input_types[1]));
    return kFailed;
  }
  output_types[0] = input_types[0];
  output_types[1] = DataType::kINT32;
  return 0;
}

int32_t TokenReorgPlugin::getOutputShapes(const nvinfer1::DimsExprs* input_shapes, int32_t inputs,
                                          const nvinfer1::DimsExprs*, int32_t number_of_shape_inputs,
                                          nvinfer1::DimsExprs* output_shapes, int32_t outputs,
                                          nvinfer1::IExprBuilder& builder) noexcept {
  if (input_shapes == nullptr || output_shapes == nullptr || !has_numbers(inputs, outputs)) return kFailed;
  if (number_of_shape_inputs != 0) {
    report("%d shape inputs, expected none", number_of_shape_inputs);
    return kFailed;
  }
  // Unknown sizes are -1 here; TensorRT calls again when they are known.
  Dims known[kInputs];
  for (int32_t i = 0; i < kInputs; ++i) {
    known[i].nbDims = input_shapes[i].nbDims;
    for (int32_t d = 0; d < known[i].nbDims && d < Dims::MAX_DIMS; ++d) {
      const nvinfer1::IDimensionExpr* size = input_shapes[i].d[d];
      known[i].d[d] = size != nullptr && size->isConstant() ? size->getConstantValue() : -1;
    }
  }
  if (!fits(known[0], known[1])) return kFailed;
  const int32_t rows = attributes_.prefix + attributes_.keep + attributes_.fuse;
  output_shapes[0].nbDims = 3;
  output_shapes[0].d[0] = input_shapes[0].d[0];
  output_shapes[0].d[1] = builder.constant(rows);
  output_shapes[0].d[2] = input_shapes[0].d[2];
  output_shapes[1].nbDims = 2;
  output_shapes[1].d[0] = input_shapes[0].d[0];
  output_shapes[1].d[1] = builder.constant(attributes_.keep);
  return 0;
}

bool TokenReorgPlugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                                 int32_t inputs, int32_t outputs) noexcept {
  if (tensors == nullptr || inputs != kInputs || outputs != kOutputs) return false;
  if (position < 0 || position >= kInputs + kOutputs) return false;
  const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  switch (position) {
    case 0:
      return dtype_of(tensor.type) >= 0;
    case 1:
      return tensor.type == DataType::kFLOAT;
    case 2:
      return tensor.type == tensors[0].desc.type;
    default:
      return tensor.type == DataType::kINT32;
  }
}

int32_t TokenReorgPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                                          const nvinfer1::DynamicPluginTensorDesc*, int32_t outputs) noexcept {
  if (in == nullptr || !has_numbers(inputs, outputs)) return kFailed;
  return fits(in[0].desc.dims, in[1].desc.dims) ? 0 : kFailed;
}

int32_t TokenReorgPlugin::onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
                                        const nvinfer1::PluginTensorDesc*, int32_t outputs) noexcept {
  if (in == nullptr || !has_numbers(inputs, outputs)) return kFailed;
  return fits(in[0].dims, in[1].dims) ? 0 : kFailed;
}

int32_t TokenReorgPlugin::enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc*,
                                  const void* const* inputs, void* const* outputs, void*,
                                  cudaStream_t stream) noexcept {
  if (in == nullptr || inputs == nullptr || outputs == nullptr) {
    report("enqueue was called with a null pointer");
    return kFailed;
  }
  if (!fits(in[0].dims, in[1].dims)) return kFailed;
  EvitTokenReorgCall call{};
  call.x = inputs[0];
  call.scores = static_cast<const float*>(inputs[1]);
  call.y = outputs[0];
  call.idx = static_cast<int32_t*>(outputs[1]);
  call.dtype = dtype_of(in[0].type);
  call.batch = static_cast<int32_t>(in[0].dims.d[0]);
  call.prefix = attributes_.prefix;
  call.candidates = static_cast<int32_t>(in[1].dims.d[1]);
  call.channels = static_cast<int32_t>(in[0].dims.d[2]);
  call.keep = attributes_.keep;
  call.fuse = attributes_.fuse;
  char message[256];
  const int32_t status = evit_token_reorg(&call, stream, message, sizeof message);
  if (status != EVIT_OK) report("%s", message);
  return status;
}

// Whether the shapes of x [B, prefix + N, C] and scores [B, N] match; -1 is an unknown size.
bool TokenReorgPlugin::fits(const Dims& x, const Dims& scores) const noexcept {
  if (x.nbDims != 3 || scores.nbDims != 2) {
    report(
        "x with %d and scores with %d dimensions, expected [batch, prefix + candidates, channels] and "
        "[batch, candidates]",
        x.nbDims, scores.nbDims);
    return false;
  }
  const auto differ = [](int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; };
  const int64_t tokens = x.d[1] < 0 ? -1 : x.d[1] - attributes_.prefix;
  if ((x.d[1] >= 0 && tokens < 0) || differ(x.d[0], scores.d[0]) || differ(tokens, scores.d[1])) {
    report(
        "x [%lld, %lld, %lld] and scores [%lld, %lld] do not go together, expected [batch, %d + candidates, channels] "
        "and [batch, candidates]",
        static_cast<long long>(x.d[0]), static_cast<long long>(x.d[1]), static_cast<long long>(x.d[2]),
        static_cast<long long>(scores.d[0]), static_cast<long long>(scores.d[1]), attributes_.prefix);
    return false;
  }
  const int64_t candidates = scores.d[1] >= 0 ? scores.d[1] : tokens;
  if (candidates >= 0 && (candidates < attributes_.keep || candidates > EVIT_MAX_CANDIDATES)) {
    report("%lld candidates, expected at least keep = %d and at most %d", static_cast<long long>(candidates),
           attributes_.keep, EVIT_MAX_CANDIDATES);
    return false;
  }
  for (const int64_t size : {x.d[0], x.d[2]}) {
    if (size <= INT32_MAX) continue;
    report("a dimension of %lld, expected at most %d", static_cast<long long>(size), INT32_MAX);
    return false;
  }
  return true;
}

// ---- creator

TokenReorgCreator::TokenReorgCreator() noexcept {
  for (int i = 0; i < 3; ++i) names_[i] = PluginField(kAttributes[i].name, nullptr, PluginFieldType::kINT32, 1);
  fields_.nbFields = 3;
  fields_.fields = names_;
}

nvinfer1::IPluginV3* TokenReorgCreator::createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                                     nvinfer1::TensorRTPhase) noexcept {
  if (fields == nullptr || (fields->fields == nullptr && fields->nbFields > 0)) {
    report("created from a null pointer, expected the fields keep, fuse and prefix");
    return nullptr;
  }
  Attributes attributes;
  bool given[3] = {};
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    const char* name = field.name == nullptr ? "" : field.name;
    int known = 0;
    while (known < 3 && std::strcmp(name, kAttributes[known].name) != 0) ++known;
    if (known == 3) {
      report("there is no field '%s', expected keep, fuse and prefix", name);
      return nullptr;
    }
    if (field.type != PluginFieldType::kINT32 || field.length != 1 || field.data == nullptr) {
      report("field %s has type %d (nvinfer1::PluginFieldType) and length %d, expected one INT32", name,
             static_cast<int>(field.type), field.length);
      return nullptr;
    }
    int32_t value;
    std::memcpy(&value, field.data, sizeof value);
    const Named& attribute = kAttributes[known];
    if (value < attribute.low || value > attribute.high) {
      report("%s is %d, expected %d to %d", name, value, attribute.low, attribute.high);
      return nullptr;
    }
    attributes.*attribute.value = value;
    given[known] = true;
  }
  for (int i = 0; i < 3; ++i) {
    if (given[i]) continue;
    report("field %s is missing, expected keep, fuse and prefix", kAttributes[i].name);
    return nullptr;
  }
  return new (std::nothrow) TokenReorgPlugin(attributes);
}

}  // namespace evit
