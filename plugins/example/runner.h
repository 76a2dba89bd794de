// What an engine is to the rest of a program: images in, logits or embeddings out. CMake chooses the library behind it.
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
  int channels, height, width, classes;  // without classes: numbers of the embedding
  std::vector<BatchProfile> profiles;    // batch sizes that the engine takes
};

class Runner {
 public:
  virtual ~Runner() = default;
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  const ModelShape& shape() const { return shape_; }

  // Runs `count` normalized images, in as many batches as it takes: count × classes numbers. One call at a time.
  std::vector<float> Infer(const float* nchw, int count);

 protected:
  explicit Runner(ModelShape shape) : shape_(std::move(shape)) {}

  // Runs one batch, of a size that some profile covers.
  virtual void Run(const float* nchw, int batch, float* answers) = 0;

 private:
  ModelShape shape_;
};

// `plugin` is the path of a library to load into this program first, or empty.
std::unique_ptr<Runner> MakeRunner(const Bundle& bundle, const std::string& plugin);

}  // namespace evit
