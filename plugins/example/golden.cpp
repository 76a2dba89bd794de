#include "golden.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <span>
#include <string_view>

#include "error.h"

namespace evit {
namespace {

static_assert(std::endian::native == std::endian::little, "zip and npy files are read as they lie in memory");

constexpr std::uint32_t kEntry = 0x02014b50, kLocal = 0x04034b50, kEnd = 0x06054b50;  // zip's "PK" records
constexpr std::size_t kEndSize = 22, kLongestComment = 65535;
constexpr double kFloor = 4;  // times eps · max|reference|: the lowest limit that evit-deploy uses

using View = std::span<const std::uint8_t>;

View Slice(View bytes, std::size_t offset, std::size_t size) {
  if (offset > bytes.size() || size > bytes.size() - offset) throw std::out_of_range("it is cut short");
  return bytes.subspan(offset, size);
}

template <typename T>
T Load(View bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, Slice(bytes, offset, sizeof(T)).data(), sizeof(T));
  return value;
}

std::string Text(View bytes) { return {bytes.begin(), bytes.end()}; }

// Content of every stored entry, by name. For sizes below 4 GiB numpy uses the usual 32-bit fields at the end.
std::map<std::string, View> ReadZip(View zip) {
  if (zip.size() < kEndSize) throw std::out_of_range("it is cut short");
  std::size_t end = zip.size() - kEndSize;
  const std::size_t last = end > kLongestComment ? end - kLongestComment : 0;
  while (Load<std::uint32_t>(zip, end) != kEnd) {
    if (end-- == last) throw std::invalid_argument("not a zip archive, or cut short");
  }
  std::map<std::string, View> entries;
  std::size_t at = Load<std::uint32_t>(zip, end + 16);
  for (int left = Load<std::uint16_t>(zip, end + 10); left > 0; --left) {
    if (Load<std::uint32_t>(zip, at) != kEntry) throw std::invalid_argument("its directory is damaged");
    const auto flags = Load<std::uint16_t>(zip, at + 8), method = Load<std::uint16_t>(zip, at + 10);
    const auto stored = Load<std::uint32_t>(zip, at + 20), size = Load<std::uint32_t>(zip, at + 24);
    const auto name_size = Load<std::uint16_t>(zip, at + 28);
    const std::string name = Text(Slice(zip, at + 46, name_size));
    if (method != 0 || (flags & 1) != 0 || stored != size) {
      throw std::invalid_argument("'" + name + "' is compressed or encrypted; numpy.savez stores it as it is");
    }
    const std::size_t local = Load<std::uint32_t>(zip, at + 42);
    if (Load<std::uint32_t>(zip, local) != kLocal) throw std::invalid_argument("its directory is damaged");
    const std::size_t skip = 30U + Load<std::uint16_t>(zip, local + 26) + Load<std::uint16_t>(zip, local + 28);
    entries[name] = Slice(zip, local + skip, size);
    at += 46U + name_size + Load<std::uint16_t>(zip, at + 30) + Load<std::uint16_t>(zip, at + 32);
  }
  return entries;
}

template <typename T>
std::vector<double> Values(View bytes) {
  std::vector<double> values(bytes.size() / sizeof(T));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(Load<T>(bytes, i * sizeof(T)));
  return values;
}

bool ReadNpy(View npy, Array* array) {
  if (Text(Slice(npy, 0, 6)) != "\x93NUMPY") throw std::invalid_argument("an entry is no array");
  const bool old = Load<std::uint8_t>(npy, 6) == 1;
  const std::size_t start = old ? 10 : 12;
  const std::size_t size = old ? Load<std::uint16_t>(npy, 8) : Load<std::uint32_t>(npy, 8);
  const std::string header = Text(Slice(npy, start, size));
  char type[8] = "", fortran[8] = "", sides[64] = "";
  const int found = std::sscanf(
      header.c_str(), "{'descr': '%7[^']', 'fortran_order': %7[A-Za-z], 'shape': (%63[0-9, ])", type, fortran, sides);
  const std::string_view descr = type, shape = sides;
  const std::size_t item = descr == "<f4" ? 4 : descr == "<f8" ? 8 : 0;
  if (found > 0 && item == 0) return false;
  if (found != 3 || std::string_view(fortran) != "False") {
    throw std::invalid_argument("an array's header is damaged, or of another order than numpy's usual one");
  }
  std::size_t bytes = item;
  for (const char* at = shape.data(); at < shape.data() + shape.size(); ++at) {
    std::size_t side = 0;
    const auto [stop, error] = std::from_chars(at, shape.data() + shape.size(), side);
    if (error == std::errc::invalid_argument) continue;  // a comma or a space
    if (error != std::errc() || (side != 0 && bytes > npy.size() / side)) throw std::out_of_range("it is cut short");
    bytes *= side;
    array->shape.push_back(side);
    at = stop - 1;
  }
  const View content = Slice(npy, start + size, bytes);
  array->values = item == 4 ? Values<float>(content) : Values<double>(content);
  return true;
}

// Largest difference of any number in [first, last); NaN if one is.
double Distance(const auto& answers, const std::vector<double>& reference, std::size_t first, std::size_t last) {
  double largest = 0;
  for (std::size_t i = first; i < last; ++i) {
    const double difference = std::abs(static_cast<double>(answers[i]) - reference[i]);
    if (std::isnan(difference)) return difference;
    largest = std::max(largest, difference);
  }
  return largest;
}

// Whether two patches of an image are so close to the boundary that rounding can swap them.
bool MayTie(const std::map<std::string, Array>& arrays, std::size_t picture, std::size_t count) {
  return std::any_of(arrays.begin(), arrays.end(), [&](const auto& named) {
    const auto& [name, margin] = named;
    if (!name.starts_with("margin_") || margin.shape.size() != 2 || margin.shape[0] != count) return false;
    const auto row = margin.values.begin() + static_cast<std::ptrdiff_t>(picture * margin.shape[1]);
    const auto end = row + static_cast<std::ptrdiff_t>(margin.shape[1]);
    return std::count_if(row, end, [](double distance) { return !(distance >= 1); }) > 1;
  });
}

const Array& Need(const std::map<std::string, Array>& arrays, const std::string& name, std::size_t dimensions) {
  const auto found = arrays.find(name);
  if (found == arrays.end()) throw std::invalid_argument("it has no '" + name + "'");
  const auto& shape = found->second.shape;
  const bool sound = shape.size() == dimensions && std::all_of(shape.begin(), shape.end(), [](std::size_t side) {
                       return side > 0 && side < (1U << 30);
                     });
  if (!sound) throw std::invalid_argument("'" + name + "' has another shape than it should");
  return found->second;
}

Golden MakeGolden(const std::map<std::string, Array>& arrays) {
  const Array &inputs = Need(arrays, "inputs", 4), &reference = Need(arrays, "reference", 2);
  const Array &expected = Need(arrays, "expected", 2), &free = Need(arrays, "expected_free", 2);
  const Array &swapped = Need(arrays, "swapped", 2), &terms = Need(arrays, "terms", 1);
  const std::size_t count = inputs.shape[0], classes = reference.shape[1], size = reference.values.size();
  for (const Array* answers : {&reference, &expected, &free, &swapped}) {
    if (answers->shape != std::vector{count, classes}) throw std::invalid_argument("its answers differ in shape");
  }
  Golden golden;
  golden.count = static_cast<int>(count);
  golden.channels = static_cast<int>(inputs.shape[1]);
  golden.height = static_cast<int>(inputs.shape[2]);
  golden.width = static_cast<int>(inputs.shape[3]);
  golden.classes = static_cast<int>(classes);
  golden.inputs.assign(inputs.values.begin(), inputs.values.end());
  golden.reference = reference.values;
  // Like Golden.limit() and Golden.tie_limits() of evit-deploy: an engine's error from FP64 may be twice PyTorch's in
  // the same precision, and larger where another choice of patches is equally valid.
  const double scale = *std::max_element(terms.values.begin(), terms.values.end());
  const double floor = kFloor * static_cast<double>(std::numeric_limits<float>::epsilon()) * scale;
  const double limit = std::max(2 * Distance(expected.values, reference.values, 0, size), floor);
  const double own_choice = std::max(limit, 2 * Distance(free.values, reference.values, 0, size));
  for (std::size_t i = 0; i < count; ++i) {
    const double room = Distance(swapped.values, reference.values, i * classes, (i + 1) * classes);
    golden.limits.push_back(MayTie(arrays, i, count) ? own_choice + room : limit);
  }
  return golden;
}

}  // namespace

std::map<std::string, Array> ReadNpz(const Bytes& content, const std::string& where) {
  try {
    std::map<std::string, Array> arrays;
    for (const auto& [name, entry] : ReadZip(content)) {
      Array array;
      if (name.ends_with(".npy") && ReadNpy(entry, &array)) arrays[name.substr(0, name.size() - 4)] = std::move(array);
    }
    return arrays;
  } catch (const std::logic_error& error) {
    throw Error(Exit::kInput, where, std::string("not a golden file (") + error.what() + ")", "Convert again.");
  }
}

Golden ReadGolden(const Bytes& content, const std::string& where) {
  const auto arrays = ReadNpz(content, where);
  try {
    return MakeGolden(arrays);
  } catch (const std::logic_error& error) {
    throw Error(Exit::kInput, where, std::string("not a golden file (") + error.what() + ")", "Convert again.");
  }
}

Verdict Compare(const Golden& golden, const std::vector<float>& logits) {
  const auto classes = static_cast<std::size_t>(golden.classes);
  if (logits.size() != golden.reference.size()) {
    throw Error(Exit::kInput, "golden.npz",
                "its answers are not this engine's (got " + std::to_string(logits.size()) + " numbers, expected " +
                    std::to_string(golden.reference.size()) + ")");
  }
  Verdict worst{0, golden.limits[0], true};
  for (std::size_t i = 0; i < golden.limits.size(); ++i) {
    const double error = Distance(logits, golden.reference, i * classes, (i + 1) * classes);
    const double limit = golden.limits[i];
    const bool passed = error <= limit;  // false if either is NaN
    if ((worst.passed && !passed) || (worst.passed == passed && error * worst.limit > worst.error * limit)) {
      worst = {error, limit, passed};
    }
  }
  return worst;
}

}  // namespace evit
