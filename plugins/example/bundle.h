// A bundle: its manifest, and its files, each checked against its hash before it is used.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace evit {

using Bytes = std::vector<std::uint8_t>;

struct Preprocess {  // in timm's terms
  int height = 0, width = 0;
  double crop_pct = 0;
  std::string crop_mode, interpolation;
  std::array<double, 3> mean{}, std{};
};

struct EngineRecord {  // how engine.plan was built
  std::string target, version;
  std::vector<std::string> gpus;      // sm80 and the like
  std::optional<std::string> plugin;  // SHA-256 of the plugin library that the plan needs
};

struct Bundle {
  std::filesystem::path path;
  Preprocess preprocess;
  std::string precision;
  std::vector<std::string> labels;           // empty if the classes have no names
  bool has_classes = true;                   // if false, the model returns an embedding
  std::string answer;                        // name of the output: "logits" or "embedding"
  std::optional<EngineRecord> engine;        // none in a bundle without engine.plan
  std::map<std::string, std::string> files;  // name inside the bundle -> SHA-256
};

Bundle ReadBundle(const std::filesystem::path& path);

// Reads a file of the bundle; throws unless its hash is the one in the manifest.
Bytes ReadListed(const Bundle& bundle, const std::string& name);

Bytes ReadFile(const std::filesystem::path& path);
std::string Sha256(const Bytes& content);

}  // namespace evit
