// Verifies a bundle's engine with its golden answers, then runs it on images. See README.md.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <span>

#include "error.h"
#include "golden.h"
#include "image.h"
#include "runner.h"

namespace {

using evit::Error;
using evit::Exit;

constexpr char kUsage[] =
    "Usage: evit_example BUNDLE [--plugin LIBRARY] [--json] [IMAGE...]\n"
    "\n"
    "Checks the bundle's engine against its golden answers, then classifies each image (JPEG or PNG),\n"
    "or prints its embedding.\n"
    "\n"
    "  --plugin LIBRARY  a TensorRT plugin library, loaded into this program: give only what you trust\n"
    "  --json            print one JSON document, with all logits or embeddings\n"
    "  --help            print this text\n"
    "\n"
    "Exit code: 0 success, 1 the golden check failed, 2 usage or input, 3 a requirement is missing,\n"
    "4 a stage failed.\n";
constexpr std::size_t kTop = 5, kNumbers = 5;
constexpr std::size_t kImagesAtATime = 32;

struct Arguments {
  std::string bundle, plugin;
  std::vector<std::string> images;
  bool json = false, help = false;
};

Arguments Parse(const std::vector<std::string>& words) {
  const std::string hint = "See evit_example --help.";
  Arguments arguments;
  std::vector<std::string> names;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (words[i] == "--help") {
      arguments.help = true;
    } else if (words[i] == "--json") {
      arguments.json = true;
    } else if (words[i] == "--plugin") {
      if (++i == words.size() || words[i].empty()) {
        throw Error(Exit::kInput, "--plugin", "a library is missing behind it", hint);
      }
      arguments.plugin = words[i];
    } else if (words[i].starts_with("-")) {  // a file with such a name can be given as ./-name
      throw Error(Exit::kInput, words[i], "no such option", hint);
    } else {
      names.push_back(words[i]);
    }
  }
  if (arguments.help) return arguments;
  if (names.empty()) throw Error(Exit::kInput, "BUNDLE", "a bundle is missing", hint);
  arguments.bundle = names.front();
  arguments.images.assign(names.begin() + 1, names.end());
  return arguments;
}

evit::Verdict CheckGolden(const evit::Bundle& bundle, evit::Runner& runner) {
  const std::string where = (bundle.path / "golden.npz").string();
  const evit::Golden golden = evit::ReadGolden(evit::ReadListed(bundle, "golden.npz"), where);
  const evit::ModelShape& shape = runner.shape();
  if (golden.channels != shape.channels || golden.height != shape.height || golden.width != shape.width) {
    throw Error(Exit::kInput, where, "its pictures are not of the engine's size", "Convert again.");
  }
  return evit::Compare(golden, runner.Infer(golden.inputs.data(), golden.count));
}

// The most probable classes with their softmax probabilities.
nlohmann::json Top(std::span<const float> logits, const std::vector<std::string>& labels) {
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - logits[order[0]]);
  nlohmann::json top;
  for (std::size_t i = 0; i < std::min(kTop, order.size()); ++i) {
    const std::size_t number = order[i];
    top.push_back({{"class", number},
                   {"label", labels.empty() ? "class " + std::to_string(number) : labels[number]},
                   {"probability", std::exp(static_cast<double>(logits[number]) - logits[order[0]]) / sum}});
  }
  return top;
}

double Length(std::span<const float> embedding) {
  const auto square = [](double sum, float number) { return sum + static_cast<double>(number) * number; };
  return std::sqrt(std::accumulate(embedding.begin(), embedding.end(), 0.0, square));
}

nlohmann::json Describe(const std::string& file, std::span<const float> answer, const evit::Bundle& bundle) {
  if (!std::all_of(answer.begin(), answer.end(), [](float number) { return std::isfinite(number); })) {
    throw Error(Exit::kStage, file, "the engine's answer is not finite: the image overflows its precision");
  }
  const std::vector<float> numbers(answer.begin(), answer.end());
  if (!bundle.has_classes) return {{"file", file}, {"embedding", numbers}, {"length", Length(answer)}};
  return {{"file", file}, {"logits", numbers}, {"top", Top(answer, bundle.labels)}};
}

void Print(const nlohmann::json& description) {
  std::cout << description["file"].get<std::string>() << "\n";
  if (!description.contains("top")) {
    const auto& numbers = description["embedding"];
    std::printf("  %zu numbers of length %.4g:", numbers.size(), description["length"].get<double>());
    for (std::size_t i = 0; i < std::min(kNumbers, numbers.size()); ++i) std::printf(" %.4g", numbers[i].get<double>());
    std::printf(numbers.size() > kNumbers ? " …\n" : "\n");
    return;
  }
  for (const auto& guess : description["top"]) {
    std::printf("%7.2f %%  %s\n", 100 * guess["probability"].get<double>(), guess["label"].get<std::string>().c_str());
  }
}

// Reads, runs and describes images, in batches of the size that the engine is tuned for.
nlohmann::json Ask(const std::vector<std::string>& files, const evit::Bundle& bundle, evit::Runner& runner) {
  nlohmann::json descriptions = nlohmann::json::array();
  for (std::size_t start = 0; start < files.size(); start += kImagesAtATime) {
    const std::size_t end = std::min(start + kImagesAtATime, files.size());
    std::vector<float> inputs;
    for (std::size_t i = start; i < end; ++i) {
      const evit::Image image = evit::DecodeImage(evit::ReadFile(files[i]), files[i]);
      const std::vector<float> input = evit::PreprocessImage(image, bundle.preprocess, files[i]);
      inputs.insert(inputs.end(), input.begin(), input.end());
    }
    const std::vector<float> answers = runner.Infer(inputs.data(), static_cast<int>(end - start));
    const std::size_t width = answers.size() / (end - start);
    for (std::size_t i = start; i < end; ++i) {
      descriptions.push_back(Describe(files[i], std::span(answers).subspan((i - start) * width, width), bundle));
    }
  }
  return descriptions;
}

void CheckFits(const evit::Bundle& bundle, const evit::ModelShape& shape) {
  const std::string where = (bundle.path / "manifest.json").string();
  if (shape.channels != 3 || shape.height != bundle.preprocess.height || shape.width != bundle.preprocess.width) {
    throw Error(Exit::kInput, where,
                "images are made as 3 channels of " + std::to_string(bundle.preprocess.height) + " × " +
                    std::to_string(bundle.preprocess.width) + ", and the engine takes " +
                    std::to_string(shape.channels) + " of " + std::to_string(shape.height) + " × " +
                    std::to_string(shape.width),
                "Prepare the images yourself, and call Runner::Infer.");
  }
  if (!bundle.labels.empty() && bundle.labels.size() != static_cast<std::size_t>(shape.classes)) {
    throw Error(Exit::kInput, where,
                "labels do not fit the engine (got " + std::to_string(bundle.labels.size()) + ", expected " +
                    std::to_string(shape.classes) + ")");
  }
}

Exit Main(const Arguments& arguments) {
  const evit::Bundle bundle = evit::ReadBundle(arguments.bundle);
  const std::unique_ptr<evit::Runner> runner = evit::MakeRunner(bundle, arguments.plugin);
  if (!arguments.images.empty()) CheckFits(bundle, runner->shape());
  const evit::Verdict verdict = CheckGolden(bundle, *runner);
  nlohmann::json document{{"golden", {{"error", verdict.error}, {"limit", verdict.limit}, {"passed", verdict.passed}}}};
  if (!arguments.json) {
    std::printf("golden check: %s, largest error %.3g of %.3g\n", verdict.passed ? "passed" : "FAILED", verdict.error,
                verdict.limit);
    std::fflush(stdout);
  }
  // Do not run an engine on images if its golden check failed.
  document["images"] = nlohmann::json::array();
  if (verdict.passed) document["images"] = Ask(arguments.images, bundle, *runner);
  if (arguments.json) {
    // file names need not be UTF-8
    std::cout << document.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
  } else {
    for (const auto& description : document["images"]) Print(description);
  }
  if (!verdict.passed) {
    throw Error(Exit::kCheckFailed, bundle.path.string(), "the engine's answers are not PyTorch's",
                "Convert again on this machine, and verify the bundle there.");
  }
  return Exit::kOk;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments = Parse({argv + 1, argv + argc});
    if (arguments.help) {
      std::cout << kUsage;
      return static_cast<int>(Exit::kOk);
    }
    return static_cast<int>(Main(arguments));
  } catch (const Error& error) {
    std::cerr << "evit_example: " << error.what() << "\n";
    return static_cast<int>(error.code());
  } catch (const std::exception& error) {  // such as out of memory, or an invalid file name
    std::cerr << "evit_example: " << error.what() << "\n";
    return static_cast<int>(Exit::kStage);
  }
}
