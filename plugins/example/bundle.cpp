#include "bundle.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "error.h"

namespace evit {
namespace {

using nlohmann::json;

constexpr int kFormat = 1;
constexpr int kLargestSide = 8192;

// Check both the name and the path after resolving symbolic links.
bool IsInside(const std::filesystem::path& root, const std::string& name) {
  const std::filesystem::path path(name);
  if (path.empty() || path.is_absolute() || name.find('\0') != std::string::npos) return false;
  if (std::find(path.begin(), path.end(), "..") != path.end()) return false;
  std::error_code error;
  const auto base = std::filesystem::weakly_canonical(root, error);
  const auto full = error ? base : std::filesystem::weakly_canonical(root / path, error);
  return !error && std::mismatch(base.begin(), base.end(), full.begin(), full.end()).first == base.end();
}

Preprocess ReadPreprocess(const json& fields) {
  Preprocess preprocess;
  const auto [height, width] = fields.at("size").get<std::pair<double, double>>();
  preprocess.crop_pct = fields.at("crop_pct").get<double>();
  preprocess.crop_mode = fields.at("crop_mode").get<std::string>();
  preprocess.interpolation = fields.at("interpolation").get<std::string>();
  preprocess.mean = fields.at("mean").get<std::array<double, 3>>();
  preprocess.std = fields.at("std").get<std::array<double, 3>>();
  const auto is_side = [](double side) { return side >= 1 && side <= kLargestSide && side == std::floor(side); };
  const bool sizes = is_side(height) && is_side(width) && preprocess.crop_pct >= 0.01 && preprocess.crop_pct <= 100;
  const bool scales = std::all_of(preprocess.std.begin(), preprocess.std.end(), [](double s) { return s > 0; });
  if (!sizes || !scales) throw std::invalid_argument("preprocess is out of range: " + fields.dump());
  preprocess.height = static_cast<int>(height);
  preprocess.width = static_cast<int>(width);
  return preprocess;
}

EngineRecord ReadEngine(const json& fields) {
  EngineRecord engine;
  engine.target = fields.at("target").get<std::string>();
  engine.version = fields.at("version").get<std::string>();
  engine.gpus = fields.at("gpus").get<std::vector<std::string>>();
  if (!fields.at("plugin").is_null()) engine.plugin = fields.at("plugin").get<std::string>();
  return engine;
}

}  // namespace

Bundle ReadBundle(const std::filesystem::path& path) {
  const auto manifest = path / "manifest.json";
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) throw Error(Exit::kInput, path.string(), "no such bundle");
  if (!std::filesystem::is_regular_file(manifest, ignored)) {
    throw Error(Exit::kInput, path.string(), "not a bundle (no manifest.json in it)");
  }
  const Bytes content = ReadFile(manifest);
  Bundle bundle;
  try {
    const json fields = json::parse(content);
    const auto format = fields.value("format", kFormat);
    if (format != kFormat) {
      throw Error(
          Exit::kInput, manifest.string(),
          "a bundle of another version (got " + std::to_string(format) + ", expected " + std::to_string(kFormat) + ")",
          "Take the program that belongs to it.");
    }
    bundle.path = path;
    bundle.files = fields.at("files").get<std::map<std::string, std::string>>();
    bundle.preprocess = ReadPreprocess(fields.at("preprocess"));
    bundle.precision = fields.at("precision").get<std::string>();
    bundle.has_classes = fields.at("model_args").value("num_classes", 1) > 0;
    bundle.answer = fields.at("outputs").at(0).at("name").get<std::string>();
    if (!fields.at("labels").is_null()) bundle.labels = fields.at("labels").get<std::vector<std::string>>();
    if (!fields.at("engine").is_null()) bundle.engine = ReadEngine(fields.at("engine"));
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {  // from nlohmann::json or thrown above
    throw Error(Exit::kInput, manifest.string(), std::string("the manifest cannot be read: ") + error.what(),
                "Convert again, or copy the bundle again.");
  }
  for (const auto& [name, hash] : bundle.files) {
    if (!IsInside(path, name)) {
      throw Error(Exit::kInput, manifest.string(), "the manifest lists a file outside the bundle (got '" + name + "')");
    }
  }
  return bundle;
}

Bytes ReadListed(const Bundle& bundle, const std::string& name) {
  const auto listed = bundle.files.find(name);
  if (listed == bundle.files.end()) {
    throw Error(Exit::kInput, bundle.path.string(), "this bundle has no " + name,
                "Convert again with the --target that makes it.");
  }
  Bytes content = ReadFile(bundle.path / name);
  const std::string hash = Sha256(content);
  if (hash != listed->second) {
    throw Error(Exit::kInput, (bundle.path / name).string(),
                "the file is damaged, or not the one that the manifest lists (SHA-256: got " + hash.substr(0, 12) +
                    "…, expected " + listed->second.substr(0, 12) + "…)",
                "Copy the bundle again.");
  }
  return content;
}

Bytes ReadFile(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {  // opening a pipe would block
    const bool exists = std::filesystem::exists(path, error);
    throw Error(Exit::kInput, path.string(), exists ? "this is not a file" : "no such file");
  }
  const auto size = std::filesystem::file_size(path, error);
  std::ifstream file(path, std::ios::binary);
  if (error || !file) throw Error(Exit::kInput, path.string(), "the file cannot be opened");
  Bytes content(size);
  file.read(reinterpret_cast<char*>(content.data()), static_cast<std::streamsize>(size));
  if (static_cast<std::uintmax_t>(file.gcount()) != size) {
    throw Error(Exit::kInput, path.string(), "the file cannot be read to its end");
  }
  return content;
}

std::string Sha256(const Bytes& content) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  if (EVP_Digest(content.data(), content.size(), digest.data(), &length, EVP_sha256(), nullptr) != 1) {
    throw Error(Exit::kEnvironment, "", "OpenSSL computes no SHA-256 here");
  }
  constexpr char kDigits[] = "0123456789abcdef";
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) {
    hex += kDigits[digest[i] >> 4];
    hex += kDigits[digest[i] & 15];
  }
  return hex;
}

}  // namespace evit
