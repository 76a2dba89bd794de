#include "image.h"

#include <png.h>
#include <turbojpeg.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "error.h"

namespace evit {
namespace {

constexpr double kMostPixels = 178'956'970;  // Pillow's limit for decompression bombs

void CheckSize(double width, double height, const std::string& where) {
  if (width * height > kMostPixels) throw Error(Exit::kInput, where, "the image has more than 178 million pixels");
}

Image DecodeJpeg(const Bytes& content, const std::string& where) {
  const std::unique_ptr<void, int (*)(tjhandle)> decoder(tjInitDecompress(), tjDestroy);
  const auto refuse = [&]() {
    throw Error(Exit::kInput, where, std::string("the JPEG cannot be read: ") + tjGetErrorStr2(decoder.get()));
  };
  Image image;
  int sampling = 0, colors = 0;
  if (tjDecompressHeader3(decoder.get(), content.data(), content.size(), &image.width, &image.height, &sampling,
                          &colors) != 0) {
    refuse();
  }
  CheckSize(image.width, image.height, where);
  if (colors == TJCS_CMYK || colors == TJCS_YCCK) {
    throw Error(Exit::kInput, where, "the JPEG is in CMYK, which has no one way to RGB", "Save it in RGB.");
  }
  image.rgb.resize(std::size_t{3} * static_cast<std::size_t>(image.width) * static_cast<std::size_t>(image.height));
  // For a truncated file the library only warns and fills the rest with gray.
  if (tjDecompress2(decoder.get(), content.data(), content.size(), image.rgb.data(), image.width, 0, image.height,
                    TJPF_RGB, TJFLAG_ACCURATEDCT | TJFLAG_STOPONWARNING | TJFLAG_LIMITSCANS) != 0) {
    refuse();
  }
  return image;
}

Image DecodePng(const Bytes& content, const std::string& where) {
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  const std::unique_ptr<png_image, void (*)(png_image*)> freed(&png, png_image_free);
  const auto refuse = [&]() {
    throw Error(Exit::kInput, where, std::string("the PNG cannot be read: ") + png.message);
  };
  if (png_image_begin_read_from_memory(&png, content.data(), content.size()) == 0) refuse();
  CheckSize(png.width, png.height, where);
  if ((png.format & PNG_FORMAT_FLAG_LINEAR) != 0) {
    throw Error(Exit::kInput, where, "the PNG has 16 bits a channel", "Save it with 8.");
  }
  png.format = PNG_FORMAT_RGBA;  // not RGB, for which libpng would blend with a background; Pillow drops transparency
  std::vector<std::uint8_t> rgba(PNG_IMAGE_SIZE(png));
  if (png_image_finish_read(&png, nullptr, rgba.data(), 0, nullptr) == 0) refuse();
  Image image{static_cast<int>(png.width), static_cast<int>(png.height), {}};
  image.rgb.resize(rgba.size() / 4 * 3);
  for (std::size_t i = 0; i < rgba.size() / 4; ++i) std::copy_n(&rgba[4 * i], 3, &image.rgb[3 * i]);
  return image;
}

struct Axis {               // mapping of one side of an image to one side of the input
  double resized = 0;       // pixels after resizing
  std::int64_t offset = 0;  // first of them in the input; negative if the input has a border
};

// Rounds half to even, as in Python.
std::int64_t Round(double value) { return static_cast<std::int64_t>(std::nearbyint(value)); }

Axis Center(double resized, int size, bool floor) {
  const double border = resized - size;
  if (border < 0) return {resized, -(static_cast<std::int64_t>(-border) / 2)};
  return {resized, floor ? static_cast<std::int64_t>(border / 2) : Round(border / 2)};
}

// timm's evaluation transform: size after resizing, and the part that is cropped.
std::pair<Axis, Axis> Geometry(const Image& image, const Preprocess& to, const std::string& where) {
  const double high = image.height, wide = image.width;
  const double scaled_high = std::floor(to.height / to.crop_pct), scaled_wide = std::floor(to.width / to.crop_pct);
  const bool floor = to.crop_mode == "center-floor", center = floor || to.crop_mode == "center";
  double height = scaled_high, width = scaled_wide;  // "squash"
  if (to.crop_mode == "border" || (center && scaled_high != scaled_wide)) {
    const double down = high / scaled_high, across = wide / scaled_wide;
    const double ratio = to.crop_mode == "border" ? std::max(down, across) : std::min(down, across);
    height = std::nearbyint(high / ratio);
    width = std::nearbyint(wide / ratio);
  } else if (center) {  // the longer side is rounded down
    (wide <= high ? height : width) = std::floor(scaled_high * std::max(high, wide) / std::min(high, wide));
  } else if (to.crop_mode != "squash") {
    throw Error(Exit::kInput, "manifest.json",
                "this program has no such crop_mode (got '" + to.crop_mode +
                    "', expected center, center-floor, squash or border)");
  }
  if (height < 1 || width < 1) throw Error(Exit::kInput, where, "the image is too narrow to be resized");
  return {Center(height, to.height, floor), Center(width, to.width, floor)};
}

double Bilinear(double x) { return std::max(0.0, 1 - std::abs(x)); }

double Bicubic(double x) {  // Keys' cubic convolution with a = -1/2
  constexpr double kA = -0.5;
  x = std::abs(x);
  if (x < 1) return ((kA + 2) * x - (kA + 3)) * x * x + 1;
  return x < 2 ? kA * (((x - 5) * x + 8) * x - 4) : 0.0;
}

// Integer weights, as in Pillow, so that every pixel is rounded alike: INT8 engines amplify differences.
constexpr int kFraction = 22;

struct Taps {  // the pixels that one pixel of the input is made from
  std::int64_t first = 0;
  std::vector<std::int32_t> weights;  // in units of 2^-kFraction; empty in the border
};

// Pixel centers are at half-integers; when an image is reduced, the filter is widened by the same factor.
std::vector<Taps> Weigh(int pixels, const Axis& axis, int size, const std::string& interpolation) {
  const bool cubic = interpolation == "bicubic";
  if (!cubic && interpolation != "bilinear") {
    throw Error(Exit::kInput, "manifest.json",
                "this program has no such interpolation (got '" + interpolation + "', expected bicubic or bilinear)");
  }
  const double scale = pixels / axis.resized, width = std::max(scale, 1.0), support = width * (cubic ? 2 : 1);
  std::vector<Taps> taps(static_cast<std::size_t>(size));
  for (int i = 0; i < size; ++i) {
    const double place = static_cast<double>(axis.offset + i);
    if (place < 0 || place >= axis.resized) continue;
    const double center = (place + 0.5) * scale;
    const auto first = static_cast<std::int64_t>(std::max(center - support + 0.5, 0.0));
    const auto last = static_cast<std::int64_t>(std::min(center + support + 0.5, static_cast<double>(pixels)));
    std::vector<double> weights;
    double sum = 0;
    for (std::int64_t j = first; j < last; ++j) {
      const double x = (static_cast<double>(j) + 0.5 - center) / width;
      weights.push_back(cubic ? Bicubic(x) : Bilinear(x));
      sum += weights.back();
    }
    Taps& tap = taps[static_cast<std::size_t>(i)];
    tap.first = first;
    for (const double weight : weights) {
      tap.weights.push_back(static_cast<std::int32_t>(std::lround(weight / sum * (1 << kFraction))));
    }
  }
  return taps;
}

// One side of the image: the layout of its pixels, and how they map to the input.
struct Side {
  std::size_t pixels, stride;
  std::vector<Taps> taps;
  std::int64_t first, last;  // pixels that are needed
};

Side MakeSide(int pixels, std::size_t stride, const Axis& axis, int size, const std::string& interpolation) {
  Side side{static_cast<std::size_t>(pixels), stride, Weigh(pixels, axis, size, interpolation), pixels, 0};
  for (const Taps& taps : side.taps) {
    if (taps.weights.empty()) continue;
    side.first = std::min(side.first, taps.first);
    side.last = std::max(side.last, taps.first + static_cast<std::int64_t>(taps.weights.size()));
  }
  side.first = std::min(side.first, side.last);
  return side;
}

// Resizes along one side and rounds to 8 bits, as Pillow does after each side. The `lines` of the other side are `line`
// apart.
std::vector<std::uint8_t> Resize(const std::uint8_t* image, const Side& side, std::size_t lines, std::size_t line) {
  std::vector<std::uint8_t> resized(lines * side.taps.size() * 3);
  std::uint8_t* to = resized.data();
  for (std::size_t i = 0; i < lines; ++i) {
    for (const Taps& taps : side.taps) {
      const std::uint8_t* from = image + i * line + static_cast<std::size_t>(taps.first) * side.stride;
      std::int32_t sums[3] = {1 << (kFraction - 1), 1 << (kFraction - 1), 1 << (kFraction - 1)};
      for (const std::int32_t weight : taps.weights) {
        for (int channel = 0; channel < 3; ++channel) sums[channel] += weight * from[channel];
        from += side.stride;
      }
      for (const std::int32_t sum : sums) *to++ = static_cast<std::uint8_t>(std::clamp(sum >> kFraction, 0, 255));
    }
  }
  return resized;
}

}  // namespace

Image DecodeImage(const Bytes& content, const std::string& where) {
  const auto starts = [&](const Bytes& magic) {
    return content.size() >= magic.size() && std::equal(magic.begin(), magic.end(), content.begin());
  };
  if (starts({0xFF, 0xD8, 0xFF})) return DecodeJpeg(content, where);
  if (starts({0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'})) return DecodePng(content, where);
  throw Error(Exit::kInput, where, "neither a JPEG nor a PNG file", "Save the image as one of them.");
}

std::vector<float> PreprocessImage(const Image& image, const Preprocess& to, const std::string& where) {
  const auto [down, across] = Geometry(image, to, where);
  const std::size_t line = 3 * static_cast<std::size_t>(image.width);
  Side one = MakeSide(image.width, 3, across, to.width, to.interpolation);
  Side two = MakeSide(image.height, line, down, to.height, to.interpolation);
  // The order of the sides affects rounding. Pillow resizes the width first, but since version 13 the height if that
  // removes more than twice as many pixels.
  const double height_loss = image.height - down.resized, width_loss = image.width - across.resized;
  const bool height_first = height_loss > 0 && height_loss > 2 * width_loss;
  if (height_first) std::swap(one, two);
  const std::uint8_t* const start = image.rgb.data() + static_cast<std::size_t>(two.first) * two.stride;
  const auto half = Resize(start, one, static_cast<std::size_t>(two.last - two.first), two.stride);
  two.stride = 3 * one.taps.size();
  for (Taps& taps : two.taps) taps.first -= std::min(two.first, taps.first);
  const auto resized = Resize(half.data(), two, one.taps.size(), 3);  // pixels of side two are adjacent now
  const auto width = static_cast<std::size_t>(to.width), area = width * static_cast<std::size_t>(to.height);
  std::vector<float> input(3 * area);
  for (std::size_t i = 0; i < one.taps.size(); ++i) {
    for (std::size_t j = 0; j < two.taps.size(); ++j) {
      const std::size_t pixel = i * two.taps.size() + j, place = height_first ? pixel : j * width + i;
      const bool border = one.taps[i].weights.empty() || two.taps[j].weights.empty();
      for (std::size_t channel = 0; channel < 3; ++channel) {
        double level = resized[3 * pixel + channel];
        if (border) level = to.crop_mode == "border" ? std::nearbyint(255 * to.mean[channel]) : 0;
        const float value = static_cast<float>(level) / 255.0F;
        input[channel * area + place] =
            (value - static_cast<float>(to.mean[channel])) / static_cast<float>(to.std[channel]);
      }
    }
  }
  return input;
}

}  // namespace evit
