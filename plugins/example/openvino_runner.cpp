// OpenVINO on the CPU: openvino/model.xml and model.bin.
#include <algorithm>
#include <openvino/openvino.hpp>
#include <sstream>

#include "error.h"
#include "runner.h"

namespace evit {
namespace {

constexpr char kXml[] = "openvino/model.xml", kBin[] = "openvino/model.bin";
constexpr BatchProfile kAnyBatch{1, 1, 32};  // any is supported; larger ones are not faster

// OpenVINO's inference precision. It must be set, because by default OpenVINO uses BF16 on processors that support it.
// INT8 files have quantized operators; their other operators are FP32.
ov::element::Type ComputeType(const std::string& precision, const std::string& where) {
  if (precision == "fp32" || precision == "int8") return ov::element::f32;
  if (precision == "fp16") return ov::element::f16;
  if (precision == "bf16") return ov::element::bf16;
  throw Error(Exit::kInput, where, "OpenVINO has no such precision (got '" + precision + "')");
}

// OpenVINO's message without the source locations at its beginning.
std::string OneLine(const std::exception& error) {
  std::istringstream lines(error.what());
  std::string text;
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line.starts_with("Exception from") || line.starts_with("Check '")) continue;
    text += (text.empty() ? "" : " ") + line;
  }
  return text.substr(0, 300);
}

ModelShape ShapeOf(const ov::CompiledModel& model, const std::string& answer, const std::string& where) {
  const auto input = model.input("input").get_partial_shape(), output = model.output(answer).get_partial_shape();
  const auto is_static = [](const ov::Dimension& side) { return side.is_static(); };
  if (input.size() != 4 || output.size() != 2 || !std::all_of(input.begin() + 1, input.end(), is_static) ||
      !is_static(output[1]) || model.input("input").get_element_type() != ov::element::f32 ||
      model.output(answer).get_element_type() != ov::element::f32) {
    throw Error(Exit::kInput, where,
                "not a model of this kind (expected float32 input [batch, channels, height, width] and " + answer +
                    " [batch, numbers])");
  }
  const auto side = [](const ov::Dimension& dimension) { return static_cast<int>(dimension.get_length()); };
  return {side(input[1]), side(input[2]), side(input[3]), side(output[1]), {kAnyBatch}};
}

class OpenVinoRunner : public Runner {
 public:
  OpenVinoRunner(ov::CompiledModel model, std::string answer, const std::string& where)
      : Runner(ShapeOf(model, answer, where)),
        model_(std::move(model)),
        request_(model_.create_infer_request()),
        answer_(std::move(answer)) {}

 private:
  void Run(const float* nchw, int batch, float* answers) override {
    const auto size = [](int side) { return static_cast<std::size_t>(side); };
    const ov::Shape sizes{size(batch), size(shape().channels), size(shape().height), size(shape().width)};
    try {
      ov::Tensor images(ov::element::f32, sizes);  // a copy, because OpenVINO requires writable memory
      std::copy_n(nchw, images.get_size(), images.data<float>());
      request_.set_tensor("input", images);
      request_.infer();
      const ov::Tensor found = request_.get_tensor(answer_);
      std::copy_n(found.data<const float>(), found.get_size(), answers);
    } catch (const std::exception& error) {
      throw Error(Exit::kStage, kXml, "OpenVINO failed: " + OneLine(error));
    }
  }

  ov::CompiledModel model_;
  ov::InferRequest request_;
  std::string answer_;
};

}  // namespace

std::unique_ptr<Runner> MakeRunner(const Bundle& bundle, const std::string& plugin) {
  if (!plugin.empty()) {
    throw Error(Exit::kInput, "--plugin", "plugins are for TensorRT, and this program is built for OpenVINO");
  }
  const std::string where = (bundle.path / kXml).string();
  const Bytes xml = ReadListed(bundle, kXml), bin = ReadListed(bundle, kBin);
  ov::Tensor weights(ov::element::u8, {bin.size()});
  std::copy(bin.begin(), bin.end(), weights.data<std::uint8_t>());
  try {
    ov::Core core;
    const auto model = core.read_model(std::string(xml.begin(), xml.end()), weights);
    if (!model->has_rt_info("evit_deploy", "precision")) {
      throw Error(Exit::kInput, where, "the file does not say its precision", "Take one that evit-deploy made.");
    }
    const auto precision = model->get_rt_info<std::string>("evit_deploy", "precision");
    const ov::element::Type type = ComputeType(precision, where);
    auto compiled = core.compile_model(model, "CPU", ov::hint::inference_precision(type),
                                       ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));
    if (compiled.get_property(ov::hint::inference_precision) != type) {
      throw Error(Exit::kEnvironment, where,
                  "this processor cannot compute in " + precision + ", and OpenVINO would take another precision",
                  "Convert with --precision fp32, or run it on another machine.");
    }
    return std::make_unique<OpenVinoRunner>(std::move(compiled), bundle.answer, where);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(Exit::kStage, where, "OpenVINO refuses the model: " + OneLine(error));
  }
}

}  // namespace evit
