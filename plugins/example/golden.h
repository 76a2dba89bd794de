// golden.npz: images with PyTorch's answers, to verify an engine before it is used.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "bundle.h"

namespace evit {

struct Array {
  std::vector<std::size_t> shape;
  std::vector<double> values;
};

// Reads the float32 and float64 arrays of a file written by numpy.savez, and skips arrays of other types.
std::map<std::string, Array> ReadNpz(const Bytes& content, const std::string& where);

struct Golden {
  int count = 0, channels = 0, height = 0, width = 0, classes = 0;
  std::vector<float> inputs;      // count × channels × height × width
  std::vector<double> reference;  // count × classes, in FP64
  std::vector<double> limits;     // maximum error of the logits, for each image
};

Golden ReadGolden(const Bytes& content, const std::string& where);

struct Verdict {
  double error, limit;  // of the image with the largest error relative to its limit
  bool passed;
};

Verdict Compare(const Golden& golden, const std::vector<float>& logits);

}  // namespace evit
