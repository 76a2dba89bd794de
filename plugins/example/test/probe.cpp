// For tests, built with sanitizers: the preprocessing alone, how batches are split, and readers on damaged files.
#include <cstdio>
#include <fstream>
#include <functional>
#include <iostream>
#include <numeric>

#include "error.h"
#include "golden.h"
#include "image.h"
#include "runner.h"

namespace {

using evit::Bytes;

// A reader must either succeed or throw an Error; anything else ends the program.
bool Reads(const std::function<void()>& read) {
  try {
    read();
    return true;
  } catch (const evit::Error& error) {
    if (error.code() != evit::Exit::kInput) throw;
    return false;
  }
}

// Calls a reader with every prefix of a file, in steps of `step` bytes, and with the file with each such byte changed.
void Damage(const Bytes& whole, std::size_t step, const std::function<void(const Bytes&)>& reader) {
  std::size_t read = 0, refused = 0;
  const auto attempt = [&](const Bytes& content) { ++(Reads([&] { reader(content); }) ? read : refused); };
  for (std::size_t size = 0; size < whole.size(); size += step) {
    attempt(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)));
  }
  std::printf("cut short: %zu read, %zu refused\n", read, refused);
  read = refused = 0;
  for (std::size_t at = 0; at < whole.size(); at += step) {
    for (const int change : {0x01, 0x80, 0xFF}) {
      Bytes content = whole;
      content[at] = static_cast<std::uint8_t>(content[at] ^ change);
      attempt(content);
    }
  }
  std::printf("changed: %zu read, %zu refused\n", read, refused);
}

void ReadAsManifest(const Bytes& content, const std::filesystem::path& folder) {
  std::ofstream(folder / "manifest.json", std::ios::binary)
      .write(reinterpret_cast<const char*>(content.data()), static_cast<std::streamsize>(content.size()));
  evit::ReadBundle(folder);
}

// An engine for images of one number, which it returns; prints the batches that it ran.
class Echo : public evit::Runner {
 public:
  explicit Echo(std::vector<evit::BatchProfile> profiles) : Runner({1, 1, 1, 1, std::move(profiles)}) {}

 private:
  void Run(const float* nchw, int batch, float* answers) override {
    std::printf("%d ", batch);
    std::copy_n(nchw, batch, answers);
  }
};

void Split(int count, const std::vector<std::string>& sizes) {
  std::vector<evit::BatchProfile> profiles;
  for (std::size_t i = 0; i + 1 < sizes.size(); i += 2) {
    profiles.push_back({std::stoi(sizes[i]), std::stoi(sizes[i]), std::stoi(sizes[i + 1])});
  }
  std::vector<float> images(static_cast<std::size_t>(count));
  std::iota(images.begin(), images.end(), 1.0F);
  const bool same = Echo(profiles).Infer(images.data(), count) == images;
  std::printf("%s\n", same ? "same" : "MIXED UP");
}

int Main(const std::vector<std::string>& words) {
  const std::string task = words.at(0);
  if (task == "preprocess") {  // BUNDLE IMAGE: the input, as raw float32, on stdout
    const auto image = evit::DecodeImage(evit::ReadFile(words.at(2)), words.at(2));
    const auto input = evit::PreprocessImage(image, evit::ReadBundle(words.at(1)).preprocess, words.at(2));
    std::fwrite(input.data(), sizeof(float), input.size(), stdout);
    return 0;
  }
  if (task == "batches") {  // COUNT MINIMUM MAXIMUM [MINIMUM MAXIMUM...]
    Split(std::stoi(words.at(1)), {words.begin() + 2, words.end()});
    return 0;
  }
  const Bytes whole = evit::ReadFile(words.at(1));  // KIND FILE STEP [FOLDER]
  const std::size_t step = std::stoul(words.at(2));
  if (task == "npz") {
    Damage(whole, step, [](const Bytes& content) { evit::ReadGolden(content, "file"); });
  } else if (task == "image") {
    Damage(whole, step, [](const Bytes& content) { evit::DecodeImage(content, "file"); });
  } else if (task == "manifest") {
    Damage(whole, step, [&](const Bytes& content) { ReadAsManifest(content, words.at(3)); });
  } else {
    throw std::invalid_argument(task);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Main({argv + 1, argv + argc});
  } catch (const evit::Error& error) {
    std::cerr << error.what() << "\n";
    return static_cast<int>(error.code());
  }
}
