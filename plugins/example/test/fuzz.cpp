// For tests: the readers under libFuzzer, with sanitizers. EVIT_FUZZ says which: manifest, golden or image.
// A reader must either succeed or throw an Error; anything else ends the program.
#include <cstdlib>
#include <fstream>

#include "error.h"
#include "golden.h"
#include "image.h"

namespace {

using evit::Bytes;

const evit::Preprocess kTo{32, 24, 0.9, "center", "bicubic", {0.5, 0.5, 0.5}, {0.5, 0.5, 0.5}};

void ReadAsManifest(const Bytes& content) {
  static const std::filesystem::path folder = std::getenv("EVIT_FUZZ_FOLDER");
  std::ofstream(folder / "manifest.json", std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
  const evit::Bundle bundle = evit::ReadBundle(folder);
  // The numbers of an accepted manifest must be safe to use.
  const evit::Image gray{5, 7, Bytes(3 * 5 * 7, 128)};
  if (bundle.preprocess.height <= 512 && bundle.preprocess.width <= 512) {
    evit::PreprocessImage(gray, bundle.preprocess, "image");
  }
}

void ReadAsGolden(const Bytes& content) {
  const evit::Golden golden = evit::ReadGolden(content, "file");
  const std::vector<float> answers(golden.reference.begin(), golden.reference.end());
  evit::Compare(golden, answers);
}

void ReadAsImage(const Bytes& content) {
  const evit::Image image = evit::DecodeImage(content, "file");
  if (image.width <= 4096 && image.height <= 4096) evit::PreprocessImage(image, kTo, "file");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::string kind = std::getenv("EVIT_FUZZ");
  const Bytes content(data, data + size);
  try {
    if (kind == "manifest") {
      ReadAsManifest(content);
    } else if (kind == "golden") {
      ReadAsGolden(content);
    } else {
      ReadAsImage(content);
    }
  } catch (const evit::Error& error) {
    if (error.code() != evit::Exit::kInput) throw;
  }
  return 0;
}
