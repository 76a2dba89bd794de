// Converts a JPEG or PNG file to a model's input by the preprocessing in the manifest, with the results of timm and
// Pillow.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"

namespace evit {

struct Image {
  int width = 0, height = 0;
  std::vector<std::uint8_t> rgb;  // height × width × 3
};

Image DecodeImage(const Bytes& content, const std::string& where);

// float32, 3 × height × width.
std::vector<float> PreprocessImage(const Image& image, const Preprocess& preprocess, const std::string& where);

}  // namespace evit
