#include "runner.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace evit {

std::vector<float> Runner::Infer(const float* nchw, int count) {
  const auto image = static_cast<std::size_t>(shape_.channels) * static_cast<std::size_t>(shape_.height) *
                     static_cast<std::size_t>(shape_.width);
  const auto classes = static_cast<std::size_t>(shape_.classes);
  std::vector<float> logits(static_cast<std::size_t>(count) * classes);
  for (int done = 0; done < count;) {
    const int left = count - done;
    int taken = 0, batch = 0;
    for (const BatchProfile& profile : shape_.profiles) {  // most images, then least padding
      const int takes = std::min(left, profile.maximum), size = std::max(takes, profile.minimum);
      if (takes > taken || (takes == taken && size < batch)) std::tie(taken, batch) = std::pair(takes, size);
    }
    const float* images = nchw + static_cast<std::size_t>(done) * image;
    float* answers = &logits[static_cast<std::size_t>(done) * classes];
    if (batch == taken) {
      Run(images, batch, answers);
    } else {  // too few for any profile: pad with zeros
      std::vector<float> padded(static_cast<std::size_t>(batch) * image);
      std::vector<float> all(static_cast<std::size_t>(batch) * classes);
      std::copy_n(images, static_cast<std::size_t>(taken) * image, padded.begin());
      Run(padded.data(), batch, all.data());
      std::copy_n(all.begin(), static_cast<std::size_t>(taken) * classes, answers);
    }
    done += taken;
  }
  return logits;
}

}  // namespace evit
