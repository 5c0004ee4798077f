// Runs a fuzz target without libFuzzer: every file of a corpus, then a fixed number of mutants of
// them, the same ones every time.
// usage: fuzz_NAME CORPUS [MUTANTS]
#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include <unistd.h>

#include "tests/fuzz/target.h"

namespace {

using Bytes = std::string;

std::vector<Bytes> read_corpus(const std::filesystem::path& folder) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::vector<Bytes> corpus;
  for (const auto& file : files) {
    std::ifstream in(file, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  return corpus;
}

class Mutator {
 public:
  explicit Mutator(const std::vector<Bytes>& corpus) : corpus_(corpus) {}

  Bytes next() {
    Bytes b = any(corpus_);
    for (std::size_t n = 1 + below(3); n > 0; --n) change(b);
    return b;
  }

 private:
  // mt19937_64 gives the same numbers everywhere; the standard's distributions do not.
  std::size_t below(std::size_t n) { return n == 0 ? 0 : static_cast<std::size_t>(random_() % n); }
  const Bytes& any(const std::vector<Bytes>& from) { return from[below(from.size())]; }

  void change(Bytes& b) {
    static const std::vector<Bytes> kWords{"null",
                                           "true",
                                           "-1",
                                           "0",
                                           "1e999",
                                           "1.5",
                                           "18446744073709551615",
                                           "9223372036854775807",
                                           "4294967296",
                                           "\"\"",
                                           "[]",
                                           "{}",
                                           "[[[[",
                                           "\"x\":",
                                           ",",
                                           "\\u0000",
                                           "\\ud800",
                                           "\xff",
                                           "\xc3",
                                           "\xe2\x96\x81",
                                           "\xf0\x9f\x98\x80",
                                           "\n",
                                           " ",
                                           "<s>",
                                           "'s",
                                           "\"__proto__\":1,"};
    const std::size_t at = below(b.size() + 1),
                      length = below(std::min<std::size_t>(b.size() - at, 32) + 1);
    switch (below(8)) {
      case 0:
        if (at < b.size()) b[at] = static_cast<char>(b[at] ^ (1 << below(8)));
        break;
      case 1:
        if (at < b.size()) b[at] = static_cast<char>(below(256));
        break;
      case 2:
        b.erase(at, length);
        break;
      case 3:
        b.insert(at, b.substr(below(b.size() + 1), length));
        break;
      case 4:
        b.insert(at, any(kWords));
        break;
      case 5:
        replace_value(b, at, any(kWords));
        break;
      case 6:
        b.resize(at);
        break;
      default:
        splice(b, at, any(corpus_));
    }
    if (b.size() > kLargest) b.resize(kLargest);
  }
  /// The next number or word of a JSON text becomes `word`: structure stays, meaning changes.
  static void replace_value(Bytes& b, std::size_t at, const Bytes& word) {
    const auto value = [](char c) {
      return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '.';
    };
    const auto begin = std::find_if(b.begin() + static_cast<std::ptrdiff_t>(at), b.end(), value);
    const auto end = std::find_if_not(begin, b.end(), value);
    b.replace(begin, end, word);
  }
  void splice(Bytes& b, std::size_t at, const Bytes& other) {
    b = b.substr(0, at) + other.substr(below(other.size() + 1));
  }

  static constexpr std::size_t kLargest = 1 << 16;
  const std::vector<Bytes>& corpus_;
  std::mt19937_64 random_{20};
};

Bytes current;  // NOLINT: for the signal handler, which gets no argument of ours

/// Leaves the input that broke the target where it can be looked at, then dies as before.
void keep_input(int signal) {
  constexpr std::array<char, 32> kFile{"crash-input"};
  std::ofstream(kFile.data(), std::ios::binary) << current;  // best effort: the process is lost
  std::fprintf(stderr, "fuzz: the input is in %s\n", kFile.data());
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void run(const Bytes& input) {
  current = input;
  // NOLINTNEXTLINE(cppcoreguidelines-pro-type-reinterpret-cast): text as bytes
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(current.data()), current.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s CORPUS [MUTANTS]\n", argv[0]);
    return 2;
  }
  for (const int signal : {SIGABRT, SIGILL, SIGTRAP, SIGSEGV, SIGFPE})
    std::signal(signal, keep_input);
  const auto corpus = read_corpus(argv[1]);
  const long mutants = argc > 2 ? std::atol(argv[2]) : 2000;
  if (corpus.empty() || mutants <= 0) {
    std::fprintf(stderr, "fuzz: nothing to run: %zu files, %ld mutants\n", corpus.size(), mutants);
    return 2;
  }
  for (const auto& input : corpus) run(input);
  if (mixlora::accepted != static_cast<long>(corpus.size())) {
    std::fprintf(stderr, "fuzz: %ld of %zu files accepted; a corpus starts from good input\n",
                 mixlora::accepted, corpus.size());
    return 1;
  }
  Mutator mutator(corpus);
  for (long i = 0; i < mutants; ++i) run(mutator.next());
  std::printf("%ld mutants of %zu files: %ld accepted, the others refused\n", mutants,
              corpus.size(), mixlora::accepted - static_cast<long>(corpus.size()));
}
