// evit::TokenReorg as a TensorRT plugin (IPluginV3): inputs x and scores, outputs y and idx, see README.md.
//
// Nothing here throws, needs CUDA, or allocates anything but the plugins: evit_token_reorg() does the work.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

namespace evit {

constexpr char kPluginName[] = "TokenReorg";
constexpr char kPluginVersion[] = "1";
constexpr char kPluginNamespace[] = "evit";

// The node's attributes.
struct Attributes {
  int32_t keep = 0;
  int32_t fuse = 0;
  int32_t prefix = 0;
};

// Destination of messages: TensorRT's logger, looked up each time because it may change; stderr if there is none.
using FindLogger = nvinfer1::ILogger* (*)();
void set_logger(FindLogger find);

class TokenReorgPlugin final : public nvinfer1::IPluginV3,
                               public nvinfer1::IPluginV3OneCore,
                               public nvinfer1::IPluginV3OneBuild,
                               public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit TokenReorgPlugin(const Attributes& attributes) noexcept;
  TokenReorgPlugin(const TokenReorgPlugin& other) noexcept : TokenReorgPlugin(other.attributes_) {}
  TokenReorgPlugin& operator=(const TokenReorgPlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t getNbOutputs() const noexcept override { return 2; }
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t outputs, const nvinfer1::DataType* input_types,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* input_shapes, int32_t inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t number_of_shape_inputs,
                          nvinfer1::DimsExprs* output_shapes, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &fields_; }

 private:
  bool fits(const nvinfer1::Dims& x, const nvinfer1::Dims& scores) const noexcept;

  Attributes attributes_;
  nvinfer1::PluginField serialized_[3];
  nvinfer1::PluginFieldCollection fields_;
};

class TokenReorgCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  TokenReorgCreator() noexcept;
  TokenReorgCreator(const TokenReorgCreator&) = delete;
  TokenReorgCreator& operator=(const TokenReorgCreator&) = delete;

  const char* getPluginName() const noexcept override { return kPluginName; }
  const char* getPluginVersion() const noexcept override { return kPluginVersion; }
  const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }

  // Returns null and logs a message unless the fields are exactly keep, fuse and prefix, one int32 each, in range.
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;

 private:
  nvinfer1::PluginField names_[3];
  nvinfer1::PluginFieldCollection fields_;
};

}  // namespace evit
