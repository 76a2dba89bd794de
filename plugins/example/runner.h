// Interface of an engine: images in, logits or embeddings out. CMake chooses the library that implements it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bundle.h"

namespace evit {

struct BatchProfile {
  int minimum, optimum, maximum;
};

struct ModelShape {
  int channels, height, width, classes;  // without classes: dimension of the embedding
  std::vector<BatchProfile> profiles;    // supported batch sizes
};

class Runner {
 public:
  virtual ~Runner() = default;
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  const ModelShape& shape() const { return shape_; }

  // Runs `count` normalized images in one or more batches; returns count × classes numbers. Not thread-safe.
  std::vector<float> Infer(const float* nchw, int count);

 protected:
  explicit Runner(ModelShape shape) : shape_(std::move(shape)) {}

  // Runs one batch, of a size that a profile covers.
  virtual void Run(const float* nchw, int batch, float* answers) = 0;

 private:
  ModelShape shape_;
};

// `plugin` is the path of a plugin library to load into this process first, or empty.
std::unique_ptr<Runner> MakeRunner(const Bundle& bundle, const std::string& plugin);

}  // namespace evit
