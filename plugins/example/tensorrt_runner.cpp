// TensorRT and TensorRT-RTX: runs engine.plan on an NVIDIA GPU. Both libraries have the same API; CMake chooses one.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iostream>
#include <limits>
#include <map>
#include <mutex>
#include <string_view>
#include <tuple>

#include "error.h"
#include "runner.h"

namespace evit {
namespace {

constexpr char kTarget[] = EVIT_TARGET, kPlan[] = "engine.plan";
constexpr bool kCaptures = std::string_view(kTarget) == "tensorrt";  // TensorRT-RTX compiles kernels while it runs
constexpr int kPluginAbi = 2;
constexpr std::size_t kLanes = 8;          // maximum number of prepared batch sizes
constexpr std::size_t kLargestNumber = 8;  // bytes per element of any output, whatever its type

void Check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  throw Error(Exit::kStage, "", std::string("CUDA failed while ") + doing + ": " + cudaGetErrorString(status));
}

class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {  // may be called from any thread
    if (severity > Severity::kERROR) return;
    const std::lock_guard lock(mutex_);
    if (errors_.size() < 3) errors_.emplace_back(message);
  }

  std::string Take() {
    const std::lock_guard lock(mutex_);
    std::string text;
    for (const std::string& error : errors_) text += (text.empty() ? "" : " ") + error;
    errors_.clear();
    return text.empty() ? "it does not say why" : text;
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> errors_;
};

// CUDA resources held by unique_ptr.
template <auto kFree>
struct Free {
  void operator()(auto* held) const { kFree(held); }
};
using DeviceMemory = std::unique_ptr<void, Free<cudaFree>>;
using PinnedMemory = std::unique_ptr<void, Free<cudaFreeHost>>;
using Stream = std::unique_ptr<CUstream_st, Free<cudaStreamDestroy>>;
using Graph = std::unique_ptr<CUgraph_st, Free<cudaGraphDestroy>>;
using GraphExec = std::unique_ptr<CUgraphExec_st, Free<cudaGraphExecDestroy>>;

DeviceMemory OnDevice(std::size_t bytes) {
  void* memory = nullptr;
  Check(cudaMalloc(&memory, bytes), "reserving memory on the GPU");
  return DeviceMemory(memory);
}

PinnedMemory Pinned(std::size_t bytes) {
  void* memory = nullptr;
  Check(cudaMallocHost(&memory, bytes), "reserving memory for copies");
  return PinnedMemory(memory);
}

std::size_t Count(const nvinfer1::Dims& dims) {
  std::size_t count = 1;
  for (int i = 0; i < dims.nbDims; ++i) count *= static_cast<std::size_t>(dims.d[i]);
  return count;
}

ModelShape ShapeOf(const nvinfer1::ICudaEngine& engine, const std::string& answer, const std::string& where) {
  const auto input = engine.getTensorShape("input"), output = engine.getTensorShape(answer.c_str());
  const auto whole = [](const nvinfer1::Dims& dims, int count) {  // static except for the batch
    return dims.nbDims == count && std::all_of(dims.d + 1, dims.d + count, [](std::int64_t side) { return side > 0; });
  };
  if (!whole(input, 4) || !whole(output, 2) || engine.getTensorDataType("input") != nvinfer1::DataType::kFLOAT ||
      engine.getTensorDataType(answer.c_str()) != nvinfer1::DataType::kFLOAT) {
    throw Error(Exit::kInput, where,
                "not an engine of this kind (expected float32 input [batch, channels, height, width] and " + answer +
                    " [batch, numbers])");
  }
  const auto side = [](std::int64_t size) { return static_cast<int>(size); };
  ModelShape shape{side(input.d[1]), side(input.d[2]), side(input.d[3]), side(output.d[1]), {}};
  for (int i = 0; i < engine.getNbOptimizationProfiles(); ++i) {
    const auto batch = [&](nvinfer1::OptProfileSelector which) {
      return side(engine.getProfileShape("input", i, which).d[0]);
    };
    shape.profiles.push_back({batch(nvinfer1::OptProfileSelector::kMIN), batch(nvinfer1::OptProfileSelector::kOPT),
                              batch(nvinfer1::OptProfileSelector::kMAX)});
    if (shape.profiles.back().minimum < 1) throw Error(Exit::kInput, where, "the engine says no batch sizes");
  }
  return shape;
}

// Resources of one batch size, with fixed addresses so that the work can be replayed as a CUDA graph.
struct Lane {
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  PinnedMemory images, answers;
  std::vector<DeviceMemory> tensors;
  void *device_images = nullptr, *device_answers = nullptr;
  std::size_t image_bytes = 0, answer_bytes = 0;
  GraphExec graph;  // empty if the engine cannot be captured
};

class TensorRtRunner : public Runner {
 public:
  TensorRtRunner(std::unique_ptr<Logger> logger, std::unique_ptr<nvinfer1::IRuntime> runtime,
                 std::unique_ptr<nvinfer1::ICudaEngine> engine, std::string answer, const std::string& where)
      : Runner(ShapeOf(*engine, answer, where)),
        logger_(std::move(logger)),
        runtime_(std::move(runtime)),
        engine_(std::move(engine)),
        answer_(std::move(answer)) {
    cudaStream_t stream = nullptr;
    Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
    stream_.reset(stream);
  }

  ~TensorRtRunner() override { cudaStreamSynchronize(stream_.get()); }

 private:
  void Run(const float* nchw, int batch, float* answers) override {
    Lane& lane = LaneFor(batch);
    cudaStream_t stream = stream_.get();
    std::memcpy(lane.images.get(), nchw, lane.image_bytes);
    Check(cudaMemcpyAsync(lane.device_images, lane.images.get(), lane.image_bytes, cudaMemcpyHostToDevice, stream),
          "copying images");
    if (lane.graph) {
      Check(cudaGraphLaunch(lane.graph.get(), stream), "running the engine");
    } else {
      Enqueue(lane);
    }
    Check(cudaMemcpyAsync(lane.answers.get(), lane.device_answers, lane.answer_bytes, cudaMemcpyDeviceToHost, stream),
          "copying answers");
    Check(cudaStreamSynchronize(stream), "running the engine");
    std::memcpy(answers, lane.answers.get(), lane.answer_bytes);
  }

  void Enqueue(const Lane& lane) {
    if (!lane.context->enqueueV3(stream_.get())) throw Failed("the engine cannot run");
  }

  Error Failed(const char* what) const {
    return {Exit::kStage, kPlan, std::string(what) + " (" + logger_->Take() + ")"};
  }

  Lane& LaneFor(int batch) {
    const auto found = lanes_.find(batch);
    if (found != lanes_.end()) return found->second;
    if (lanes_.size() >= kLanes) lanes_.clear();
    Lane lane = MakeLane(batch);
    if (kCaptures) lane.graph = Capture(lane);
    return lanes_.emplace(batch, std::move(lane)).first->second;
  }

  // Of the profiles that cover a batch, the one tuned for the nearest size on a logarithmic scale.
  int ProfileFor(int batch) const {
    int best = 0;
    double nearest = std::numeric_limits<double>::infinity();
    for (std::size_t i = 0; i < shape().profiles.size(); ++i) {
      const BatchProfile& profile = shape().profiles[i];
      const double distance = std::abs(std::log(static_cast<double>(batch) / profile.optimum));
      if (profile.minimum <= batch && batch <= profile.maximum && distance < nearest) {
        best = static_cast<int>(i);
        nearest = distance;
      }
    }
    return best;
  }

  Lane MakeLane(int batch) {
    Lane lane;
    lane.context.reset(engine_->createExecutionContext());
    if (!lane.context) throw Failed("no execution context; is the GPU's memory full?");
    const nvinfer1::Dims sizes{4, {batch, shape().channels, shape().height, shape().width}};
    if (!lane.context->setOptimizationProfileAsync(ProfileFor(batch), stream_.get()) ||
        !lane.context->setInputShape("input", sizes)) {
      throw Failed("the engine does not take this batch size");
    }
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {  // outputs kept_<block>, if any, stay on the GPU
      const std::string name = engine_->getIOTensorName(i);
      const std::size_t numbers = Count(lane.context->getTensorShape(name.c_str()));
      lane.tensors.push_back(OnDevice(numbers * kLargestNumber));
      void* const memory = lane.tensors.back().get();
      if (!lane.context->setTensorAddress(name.c_str(), memory)) throw Failed("the engine takes no memory");
      if (name == "input") std::tie(lane.device_images, lane.image_bytes) = std::pair(memory, numbers * sizeof(float));
      if (name == answer_)
        std::tie(lane.device_answers, lane.answer_bytes) = std::pair(memory, numbers * sizeof(float));
    }
    lane.images = Pinned(lane.image_bytes);
    lane.answers = Pinned(lane.answer_bytes);
    Check(cudaMemsetAsync(lane.device_images, 0, lane.image_bytes, stream_.get()), "clearing memory");
    Enqueue(lane);  // the first call makes allocations that cannot be captured
    Check(cudaStreamSynchronize(stream_.get()), "running the engine");
    return lane;
  }

  // Captures one call as a CUDA graph; empty if that is impossible.
  GraphExec Capture(const Lane& lane) {
    cudaGraph_t recorded = nullptr;
    cudaGraphExec_t ready = nullptr;
    Check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "recording a graph");
    const bool enqueued = lane.context->enqueueV3(stream_.get());
    const bool ended = cudaStreamEndCapture(stream_.get(), &recorded) == cudaSuccess;
    const Graph graph(recorded);
    if (!enqueued || !ended || cudaGraphInstantiate(&ready, recorded, 0) != cudaSuccess) {
      cudaGetLastError();  // clear the error; later calls run without a graph
      logger_->Take();
      return nullptr;
    }
    return GraphExec(ready);
  }

  // Destroyed in reverse order: each needs those above it.
  std::unique_ptr<Logger> logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::string answer_;
  Stream stream_;
  std::map<int, Lane> lanes_;
};

// Checks, before any of its code runs, that a library is a plugin for this TensorRT, by the identity line in the file.
void CheckIdentity(const Bytes& library, const std::string& where) {
  constexpr std::string_view kLine = "evit-deploy library: kind=registers ";
  constexpr std::ptrdiff_t kLongest = 256;
  const auto line = std::search(library.begin(), library.end(), kLine.begin(), kLine.end());
  const std::string text(line, line + std::min(kLongest, library.end() - line));
  int abi = 0, major = 0;
  if (std::sscanf(text.c_str() + std::min(text.size(), kLine.size()),
                  "version=%*s abi=%d architectures=%*s tensorrt=%d", &abi, &major) != 2) {
    throw Error(Exit::kInput, where, "not a plugin of evit-deploy that registers itself",
                "Give libevit_plugin.so, which evit-deploy plugin build makes.");
  }
  if (abi != kPluginAbi) {
    throw Error(
        Exit::kInput, where,
        "a plugin of another version (got " + std::to_string(abi) + ", expected " + std::to_string(kPluginAbi) + ")");
  }
  if (major != getInferLibMajorVersion()) {
    throw Error(Exit::kEnvironment, where,
                "the plugin was built for another TensorRT (got " + std::to_string(major) + ", expected " +
                    std::to_string(getInferLibMajorVersion()) + ")",
                "Build it for this one.");
  }
}

// The library stays loaded until the program ends, because TensorRT's registry refers to it.
void LoadPlugin(const std::string& plugin, const Bundle& bundle) {
  const std::string where = std::filesystem::absolute(plugin).string();  // dlopen would search for a bare name
  const Bytes content = ReadFile(where);
  CheckIdentity(content, where);
  if (const std::string hash = Sha256(content); bundle.engine->plugin && *bundle.engine->plugin != hash) {
    throw Error(
        Exit::kInput, where,
        "the plan was built with another plugin (got SHA-256 " + hash + ", expected " + *bundle.engine->plugin + ")",
        "Give that one, or convert again with this one.");
  }
  void* const library = dlopen(where.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Error(Exit::kInput, where, std::string("the plugin library cannot be loaded (") + dlerror() + ")",
                "Build it on this machine: evit-deploy plugin build.");
  }
  const auto refusal = reinterpret_cast<const char* (*)()>(dlsym(library, "evit_plugin_refusal"));
  const char* const words = refusal == nullptr ? "it does not say whether it registered" : refusal();
  if (words != nullptr) throw Error(Exit::kStage, where, std::string("TensorRT has not taken the plugin: ") + words);
}

std::string GpuHere() {
  int count = 0, major = 0, minor = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    const std::string why = status == cudaSuccess ? "none found" : cudaGetErrorString(status);
    throw Error(
        Exit::kEnvironment, "", "no CUDA device can be used (" + why + ")",
        "Run it on a machine with an NVIDIA GPU and a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + ".");
  }
  Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "asking for the GPU");
  Check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "asking for the GPU");
  return "sm" + std::to_string(major) + std::to_string(minor);
}

std::string VersionHere() {
  return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
         std::to_string(getInferLibPatchVersion());
}

// Returns why the library did not load an undamaged plan.
Error Refusal(const Bundle& bundle, const std::string& words, const std::string& gpu) {
  const EngineRecord& engine = *bundle.engine;
  const std::string where = (bundle.path / kPlan).string(), here = VersionHere();
  std::string gpus;
  bool fits = engine.gpus.empty();
  for (const std::string& name : engine.gpus) {
    gpus += (gpus.empty() ? "" : ", ") + name;
    fits = fits || name == gpu;
  }
  if (engine.version != here && !engine.version.starts_with(here + ".")) {
    return {Exit::kEnvironment, where,
            "the plan was built with another " + engine.target + " (got " + here + " here, expected " + engine.version +
                "; the library says: " + words + ")",
            "Convert again here, or install that version."};
  }
  if (!fits) {
    return {Exit::kInput, where,
            "the plan was built for another GPU (got " + gpu + " here, expected " + gpus +
                "; the library says: " + words + ")",
            "Convert again on this machine."};
  }
  return {Exit::kInput, where, engine.target + " refuses the plan (" + words + ")", "Convert again on this machine."};
}

}  // namespace

std::unique_ptr<Runner> MakeRunner(const Bundle& bundle, const std::string& plugin) {
  const std::string where = (bundle.path / kPlan).string();
  const Bytes plan = ReadListed(bundle, kPlan);
  if (!bundle.engine) throw Error(Exit::kInput, where, "the manifest does not say what the plan was built with");
  if (bundle.engine->target != kTarget) {
    throw Error(Exit::kInput, where,
                "the plan is for " + bundle.engine->target + ", and this program is built for " + kTarget,
                std::string("Build the program for the other, or convert with --target ") + kTarget + ".");
  }
  if (bundle.engine->plugin && plugin.empty()) {  // a library that merely sits next to the plan is never loaded
    throw Error(Exit::kInput, where, "the plan needs the plugin that it was built with",
                "Give it with --plugin LIBRARY; its SHA-256 is " + *bundle.engine->plugin + ".");
  }
  if (!plugin.empty() && std::string_view(kTarget) == "tensorrt-rtx") {
    throw Error(Exit::kInput, plugin, "TensorRT-RTX takes no plugins", "Leave --plugin out.");
  }
  if (!plugin.empty()) LoadPlugin(plugin, bundle);  // it registers itself with TensorRT, which is linked
  const std::string gpu = GpuHere();
  auto logger = std::make_unique<Logger>();
  std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(*logger));
  if (!runtime) {
    throw Error(Exit::kEnvironment, "", std::string(kTarget) + " does not start (" + logger->Take() + ")");
  }
  std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) throw Refusal(bundle, logger->Take(), gpu);
  return std::make_unique<TensorRtRunner>(std::move(logger), std::move(runtime), std::move(engine), bundle.answer,
                                          where);
}

}  // namespace evit
