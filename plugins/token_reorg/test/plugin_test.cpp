// Drives the creator and the plugin as TensorRT would: fields, types, formats, shapes through an IExprBuilder,
// serialization, clones, and enqueue, with the host build in place of the GPU's kernel.
#include "plugin.h"

#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "checks.h"
#include "token_reorg.h"

// Called by plugin.cpp; here it runs the kernel's code on the CPU.
int32_t evit_token_reorg(const EvitTokenReorgCall* call, void*, char* message, size_t size) {
  const EvitCut cut{};
  return evit_token_reorg_on_host(call, &cut, message, size);
}

namespace {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;

// ---- stand-ins for TensorRT

class Log final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    CHECK(severity == Severity::kERROR);
    last = message;
  }
  std::string last;
};

Log logger;
nvinfer1::ILogger* find_logger() { return &logger; }

// Whether the last message contains a text; clears the message.
bool said(const char* words) {
  const bool found = logger.last.find(words) != std::string::npos;
  if (!found) std::fprintf(stderr, "the log says '%s', not '%s'\n", logger.last.c_str(), words);
  logger.last.clear();
  return found;
}

// A known size, or -1 for one that depends on the batch.
class Size final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Size(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;
};

class Builder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const nvinfer1::IDimensionExpr* constant(int64_t value) override { return &sizes_.emplace_back(value); }
  const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                                            const nvinfer1::IDimensionExpr&) override {
    CHECK(!"the plugin needs no arithmetic on sizes");
    return nullptr;
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                    const nvinfer1::IDimensionExpr&) override {
    CHECK(!"no output has a size that depends on data");
    return nullptr;
  }

 private:
  std::deque<Size> sizes_;
};

struct Fields {
  explicit Fields(std::vector<PluginField> list) : fields(std::move(list)) {
    collection.nbFields = static_cast<int32_t>(fields.size());
    collection.fields = fields.data();
  }
  std::vector<PluginField> fields;
  nvinfer1::PluginFieldCollection collection;
};

using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

evit::TokenReorgCreator creator;

Plugin create(const std::vector<PluginField>& list, nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
  const Fields fields(list);
  return Plugin(creator.createPlugin("reorg", &fields.collection, phase));
}

Plugin create(int32_t keep, int32_t fuse, int32_t prefix) {
  return create({{"keep", &keep, PluginFieldType::kINT32, 1},
                 {"fuse", &fuse, PluginFieldType::kINT32, 1},
                 {"prefix", &prefix, PluginFieldType::kINT32, 1}});
}

template <class Interface>
Interface& interface_of(const Plugin& plugin, nvinfer1::PluginCapabilityType type) {
  auto* capability = plugin->getCapabilityInterface(type);
  CHECK(capability != nullptr);
  return *static_cast<Interface*>(capability);
}

nvinfer1::IPluginV3OneBuild& build_of(const Plugin& plugin) {
  return interface_of<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD);
}

nvinfer1::IPluginV3OneRuntime& runtime_of(const Plugin& plugin) {
  return interface_of<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME);
}

nvinfer1::Dims dims(const std::vector<int64_t>& sizes) {
  nvinfer1::Dims result{};
  result.nbDims = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) result.d[i] = sizes[i];
  return result;
}

nvinfer1::PluginTensorDesc tensor(DataType type, const std::vector<int64_t>& sizes,
                                  TensorFormat format = TensorFormat::kLINEAR) {
  nvinfer1::PluginTensorDesc result{};
  result.dims = dims(sizes);
  result.type = type;
  result.format = format;
  return result;
}

// ---- tests

void test_names() {
  CHECK(std::strcmp(creator.getPluginName(), "TokenReorg") == 0);
  CHECK(std::strcmp(creator.getPluginVersion(), "1") == 0);
  CHECK(std::strcmp(creator.getPluginNamespace(), "evit") == 0);
  const auto* fields = creator.getFieldNames();
  CHECK(fields->nbFields == 3);
  const char* const names[] = {"keep", "fuse", "prefix"};
  for (int i = 0; i < 3; ++i) {
    CHECK(std::strcmp(fields->fields[i].name, names[i]) == 0);
    CHECK(fields->fields[i].type == PluginFieldType::kINT32);
    CHECK(fields->fields[i].length == 1);
  }
  const Plugin plugin = create(138, 1, 1);
  const auto& core = interface_of<nvinfer1::IPluginV3OneCore>(plugin, nvinfer1::PluginCapabilityType::kCORE);
  CHECK(std::strcmp(core.getPluginName(), "TokenReorg") == 0);
  CHECK(std::strcmp(core.getPluginVersion(), "1") == 0);
  CHECK(std::strcmp(core.getPluginNamespace(), "evit") == 0);
  CHECK(plugin->getCapabilityInterface(static_cast<nvinfer1::PluginCapabilityType>(99)) == nullptr);
}

void test_types() {
  const Plugin plugin = create(138, 1, 1);
  const auto& build = build_of(plugin);
  CHECK(build.getNbOutputs() == 2);
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    const DataType in[] = {type, DataType::kFLOAT};
    DataType out[2] = {};
    CHECK(build.getOutputDataTypes(out, 2, in, 2) == 0);
    CHECK(out[0] == type);
    CHECK(out[1] == DataType::kINT32);
  }
  DataType out[2] = {};
  const DataType half_scores[] = {DataType::kHALF, DataType::kHALF}, int8[] = {DataType::kINT8, DataType::kFLOAT};
  CHECK(build.getOutputDataTypes(out, 2, half_scores, 2) != 0);
  CHECK(said("expected FP32, FP16 or BF16, and FP32"));
  CHECK(build.getOutputDataTypes(out, 2, int8, 2) != 0);
  CHECK(said("x of type 2"));
  CHECK(build.getOutputDataTypes(out, 3, int8, 2) != 0);
  CHECK(said("2 inputs and 3 outputs"));
  CHECK(build.getOutputDataTypes(nullptr, 2, int8, 2) != 0);
}

void test_formats() {
  const Plugin plugin = create(2, 1, 1);
  auto& build = build_of(plugin);
  const auto supported = [&](int32_t position, DataType x, DataType scores, DataType y, DataType idx,
                             TensorFormat format = TensorFormat::kLINEAR) {
    nvinfer1::DynamicPluginTensorDesc tensors[4] = {};
    const DataType types[] = {x, scores, y, idx};
    for (int i = 0; i < 4; ++i) tensors[i].desc = tensor(types[i], {}, i == position ? format : TensorFormat::kLINEAR);
    return build.supportsFormatCombination(position, tensors, 2, 2);
  };
  constexpr auto kF = DataType::kFLOAT, kH = DataType::kHALF, kB = DataType::kBF16, kI = DataType::kINT32;
  for (const DataType type : {kF, kH, kB})
    for (int position = 0; position < 4; ++position) {
      CHECK(supported(position, type, kF, type, kI));
      CHECK(!supported(position, type, kF, type, kI, TensorFormat::kCHW32));
    }
  CHECK(!supported(0, DataType::kINT8, kF, DataType::kINT8, kI));
  CHECK(!supported(1, kH, kH, kH, kI));
  CHECK(!supported(2, kH, kF, kF, kI));
  CHECK(!supported(3, kH, kF, kH, DataType::kINT64));
  CHECK(!build.supportsFormatCombination(0, nullptr, 2, 2));
  nvinfer1::DynamicPluginTensorDesc tensors[4] = {};
  CHECK(!build.supportsFormatCombination(4, tensors, 2, 2));
  CHECK(!build.supportsFormatCombination(0, tensors, 3, 1));
}

int32_t shapes_of(const Plugin& plugin, const std::vector<int64_t>& x, const std::vector<int64_t>& scores,
                  std::vector<int64_t> (&out)[2]) {
  std::deque<Size> sizes;
  nvinfer1::DimsExprs in[2] = {}, result[2] = {};
  const std::vector<int64_t>* const given[] = {&x, &scores};
  for (int i = 0; i < 2; ++i) {
    in[i].nbDims = static_cast<int32_t>(given[i]->size());
    for (size_t d = 0; d < given[i]->size(); ++d) in[i].d[d] = &sizes.emplace_back((*given[i])[d]);
  }
  Builder builder;
  const int32_t status = build_of(plugin).getOutputShapes(in, 2, nullptr, 0, result, 2, builder);
  for (int i = 0; i < 2 && status == 0; ++i) {
    out[i].clear();
    for (int32_t d = 0; d < result[i].nbDims; ++d)
      out[i].push_back(result[i].d[d]->isConstant() ? result[i].d[d]->getConstantValue() : -1);
    CHECK(result[i].d[0] == in[0].d[0]);  // the batch itself, not a copy of its value
  }
  return status;
}

void test_shapes() {
  std::vector<int64_t> out[2];
  CHECK(shapes_of(create(138, 1, 1), {-1, 197, 384}, {-1, 196}, out) == 0);
  CHECK(out[0] == std::vector<int64_t>{-1, 140, 384});
  CHECK(out[1] == std::vector<int64_t>{-1, 138});
  CHECK(shapes_of(create(98, 0, 5), {8, 201, 64}, {8, 196}, out) == 0);
  CHECK(out[0] == std::vector<int64_t>{8, 103, 64});
  CHECK(out[1] == std::vector<int64_t>{8, 98});
  CHECK(shapes_of(create(3, 1, 0), {2, -1, 16}, {2, -1}, out) == 0);
  CHECK(out[0] == std::vector<int64_t>{2, 4, 16});
  CHECK(shapes_of(create(196, 1, 1), {1, 197, 8}, {1, 196}, out) == 0);  // keeping all is allowed

  CHECK(shapes_of(create(197, 1, 1), {-1, 197, 384}, {-1, 196}, out) != 0);
  CHECK(said("196 candidates, expected at least keep = 197 and at most 4096"));
  CHECK(shapes_of(create(10, 1, 2), {-1, 197, 384}, {-1, 196}, out) != 0);
  CHECK(said("x [-1, 197, 384] and scores [-1, 196] do not go together, expected [batch, 2 + candidates, channels]"));
  CHECK(shapes_of(create(10, 1, 1), {4, 197, 384}, {8, 196}, out) != 0);
  CHECK(said("do not go together"));
  CHECK(shapes_of(create(10, 1, 1), {-1, 197, 384, 1}, {-1, 196}, out) != 0);
  CHECK(said("x with 4 and scores with 2 dimensions"));
  CHECK(shapes_of(create(10, 1, 1), {-1, 4098, 384}, {-1, 4097}, out) != 0);
  CHECK(said("4097 candidates"));
  CHECK(shapes_of(create(1, 1, 8), {1, 3, 4}, {1, -1}, out) != 0);
  CHECK(said("do not go together"));

  Builder builder;
  nvinfer1::DimsExprs exprs[2] = {};
  const Plugin plugin = create(1, 1, 1);
  auto& build = build_of(plugin);
  CHECK(build.getOutputShapes(exprs, 1, nullptr, 0, exprs, 2, builder) != 0);
  CHECK(said("1 inputs and 2 outputs"));
  CHECK(build.getOutputShapes(exprs, 2, exprs, 1, exprs, 2, builder) != 0);
  CHECK(said("1 shape inputs"));
  CHECK(build.getOutputShapes(nullptr, 2, nullptr, 0, exprs, 2, builder) != 0);
}

void test_configure() {
  const Plugin plugin = create(138, 1, 1);
  nvinfer1::DynamicPluginTensorDesc in[2] = {}, out[2] = {};
  in[0].desc = tensor(DataType::kHALF, {-1, 197, 384});
  in[1].desc = tensor(DataType::kFLOAT, {-1, 196});
  CHECK(build_of(plugin).configurePlugin(in, 2, out, 2) == 0);
  in[1].desc = tensor(DataType::kFLOAT, {-1, 197});
  CHECK(build_of(plugin).configurePlugin(in, 2, out, 2) != 0);
  CHECK(said("do not go together"));
  CHECK(build_of(plugin).configurePlugin(nullptr, 2, out, 2) != 0);
  CHECK(build_of(plugin).getWorkspaceSize(in, 2, out, 2) == 0);
}

void test_serialization() {
  const Plugin original = create(138, 1, 5);
  Plugin copies[3];
  copies[0].reset(original->clone());
  copies[1].reset(runtime_of(original).attachToContext(nullptr));
  const auto* written = runtime_of(original).getFieldsToSerialize();
  CHECK(written != nullptr);
  copies[2].reset(creator.createPlugin("reorg", written, nvinfer1::TensorRTPhase::kRUNTIME));
  for (const Plugin& copy : copies) {
    CHECK(copy != nullptr && copy != original);
    const auto* fields = runtime_of(copy).getFieldsToSerialize();
    CHECK(fields != written && fields->fields != written->fields);  // it lives as long as the copy does
    CHECK(fields->nbFields == 3);
    const int32_t wanted[] = {138, 1, 5};
    for (int i = 0; i < 3; ++i) {
      CHECK(fields->fields[i].type == PluginFieldType::kINT32 && fields->fields[i].length == 1);
      CHECK(*static_cast<const int32_t*>(fields->fields[i].data) == wanted[i]);
    }
  }
}

void test_bad_fields() {
  const int32_t one = 1, keep = 138;
  const float number = 1;
  const int64_t wide = 1;
  const PluginField fuse("fuse", &one, PluginFieldType::kINT32, 1), prefix("prefix", &one, PluginFieldType::kINT32, 1);
  const PluginField good("keep", &keep, PluginFieldType::kINT32, 1);
  CHECK(create({prefix, good, fuse}) != nullptr);  // in any order

  CHECK(create({fuse, prefix}) == nullptr);
  CHECK(said("field keep is missing"));
  CHECK(create({good, fuse}) == nullptr);
  CHECK(said("field prefix is missing"));
  CHECK(create(std::vector<PluginField>{}) == nullptr);
  CHECK(said("is missing"));
  CHECK(create({PluginField("keep", &number, PluginFieldType::kFLOAT32, 1), fuse, prefix}) == nullptr);
  CHECK(said("field keep has type 1 (nvinfer1::PluginFieldType) and length 1, expected one INT32"));
  CHECK(create({PluginField("keep", &wide, PluginFieldType::kINT64, 1), fuse, prefix}) == nullptr);
  CHECK(said("expected one INT32"));
  CHECK(create({PluginField("keep", &keep, PluginFieldType::kINT32, 2), fuse, prefix}) == nullptr);
  CHECK(said("length 2"));
  CHECK(create({PluginField("keep", nullptr, PluginFieldType::kINT32, 1), fuse, prefix}) == nullptr);
  CHECK(said("expected one INT32"));
  CHECK(create({PluginField(nullptr, &keep, PluginFieldType::kINT32, 1), fuse, prefix}) == nullptr);
  CHECK(said("there is no field ''"));
  CHECK(create({good, fuse, prefix, PluginField("kept", &keep, PluginFieldType::kINT32, 1)}) == nullptr);
  CHECK(said("there is no field 'kept', expected keep, fuse and prefix"));
  CHECK(create(0, 1, 1) == nullptr);
  CHECK(said("keep is 0, expected 1 to 4096"));
  CHECK(create(4097, 1, 1) == nullptr);
  CHECK(said("keep is 4097"));
  CHECK(create(1, 2, 1) == nullptr);
  CHECK(said("fuse is 2, expected 0 to 1"));
  CHECK(create(1, 1, -1) == nullptr);
  CHECK(said("prefix is -1, expected 0 to 8"));
  CHECK(create(1, 1, 9) == nullptr);
  CHECK(said("prefix is 9"));
  CHECK(creator.createPlugin("reorg", nullptr, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
  CHECK(said("null pointer"));
  nvinfer1::PluginFieldCollection broken;
  broken.nbFields = 3;
  CHECK(creator.createPlugin("reorg", &broken, nvinfer1::TensorRTPhase::kBUILD) == nullptr);
  CHECK(said("null pointer"));
}

void test_enqueue() {
  // One class token and four candidates of two channels, two images; the highest scores are 3 and 0, then 1.
  const std::vector<float> x = {9, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<float> scores = {0.25F, 0.125F, 0.0625F, 0.5F, 0.5F, 0.5F, 0.5F, 0.5F};
  std::vector<float> y(2 * 4 * 2, -1);
  std::vector<int32_t> idx(2 * 2, -1);
  const Plugin plugin = create(2, 1, 1);
  auto& runtime = runtime_of(plugin);
  nvinfer1::PluginTensorDesc in[] = {tensor(DataType::kFLOAT, {2, 5, 2}), tensor(DataType::kFLOAT, {2, 4})};
  const nvinfer1::PluginTensorDesc out[] = {tensor(DataType::kFLOAT, {2, 4, 2}), tensor(DataType::kINT32, {2, 2})};
  const void* inputs[] = {x.data(), scores.data()};
  void* outputs[] = {y.data(), idx.data()};
  CHECK(runtime.onShapeChange(in, 2, out, 2) == 0);
  CHECK(runtime.enqueue(in, out, inputs, outputs, nullptr, nullptr) == 0);
  CHECK(idx == std::vector<int32_t>{3, 0, 0, 1});
  CHECK(y == std::vector<float>{9, 9, 7, 8, 1, 2, 0.6875F, 0.875F, 9, 9, 1, 2, 3, 4, 6, 7});

  inputs[1] = nullptr;
  CHECK(runtime.enqueue(in, out, inputs, outputs, nullptr, nullptr) != 0);
  CHECK(said("scores is a null pointer"));
  inputs[1] = scores.data();
  CHECK(runtime.enqueue(in, out, inputs, nullptr, nullptr, nullptr) != 0);
  CHECK(said("null pointer"));
  in[1] = tensor(DataType::kFLOAT, {2, 3});
  CHECK(runtime.onShapeChange(in, 2, out, 2) != 0);
  CHECK(said("do not go together"));
  CHECK(runtime.enqueue(in, out, inputs, outputs, nullptr, nullptr) != 0);
  CHECK(said("do not go together"));
  in[0] = tensor(DataType::kFLOAT, {2, 2, 2});
  in[1] = tensor(DataType::kFLOAT, {2, 1});
  CHECK(runtime.enqueue(in, out, inputs, outputs, nullptr, nullptr) != 0);
  CHECK(said("1 candidates, expected at least keep = 2"));
  in[0] = tensor(DataType::kINT8, {2, 5, 2});
  in[1] = tensor(DataType::kFLOAT, {2, 4});
  CHECK(runtime.enqueue(in, out, inputs, outputs, nullptr, nullptr) != 0);
  CHECK(said("dtype is -1"));
}

}  // namespace

int main() {
  evit::set_logger(find_logger);
  test_names();
  test_types();
  test_formats();
  test_shapes();
  test_configure();
  test_serialization();
  test_bad_fields();
  test_enqueue();
  CHECK(logger.last.empty());  // no unchecked message is left
  checks::finish();
}
