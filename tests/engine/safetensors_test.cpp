// Safetensors: what is read, converted and written; what is refused, and how it is said.
#include "engine/safetensors.h"

#include <bit>
#include <cmath>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>

#include <nlohmann/json.hpp>
#include <sys/resource.h>
#include <sys/stat.h>

#include "engine/json_file.h"
#include "tests/experiments/folder.h"
#include "tests/support/catch.h"
#include "tests/support/refusal.h"

using namespace mixlora;

namespace {

std::string file_of(const std::string& header, std::size_t data) {
  std::string bytes(8, '\0');
  const std::uint64_t size = header.size();
  std::memcpy(bytes.data(), &size, 8);
  return bytes + header + std::string(data, '\0');
}
std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"x":)" + tensor(dtype, shape, offsets) + "}";
}
FileTensors parse(const std::string& bytes) {
  return parse_safetensors(std::as_bytes(std::span(bytes.data(), bytes.size())), "the file");
}

}  // namespace

TEST_CASE("a bad safetensors file is refused with what and where", "[engine][hostile]") {
  struct Case {
    std::string bytes, message;
  };
  const std::string good = tensor("F32", "[2]", "[0,8]");
  const std::string huge(100'000, 'x');
  const std::vector<Case> cases{
      {"", "0 bytes; a safetensors file has at least 8"},
      {"1234567", "7 bytes"},
      {std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8), "truncated, or not safetensors"},
      {std::string("\x10\0\0\0\0\0\0\0{}", 10), "its header says 16 bytes, the file has 10"},
      {file_of("", 0), "line 1, column 0"},
      {file_of("[1]", 0), "expected an object of tensors, found [1]"},
      {file_of("{\"x\":", 0), "line 1, column 5"},
      {file_of("\xff\xfe{}", 0), "line 1"},
      {file_of("{\"x\xc3\":1}", 0), "line 1"},
      {file_of("{\"" + huge, 0), "line 1"},
      {file_of(R"({"x":1})", 0), R"(tensor "x": expected {dtype, shape, data_offsets)"},
      {file_of(R"({"x":{"dtype":"F32"}})", 0), "expected {dtype, shape"},
      {file_of(R"({"x":")" + huge + "\"}", 0), "(100002 bytes)"},
      {file_of(R"({"x":)" + good + R"(,"x":)" + good + "}", 8), R"(the key "x" stands twice)"},
      {file_of(one("F33", "[2]", "[0,8]"), 8), R"(unknown type "F33"; expected F32, F16 or BF16)"},
      {file_of(one("F32", "[2]", "[0,8,9]"), 8), "data_offsets: [begin, end]"},
      {file_of(one("F32", "[-2]", "[0,8]"), 8), "shape: expected a whole number from 0, found -2"},
      {file_of(one("F32", "[2.0]", "[0,8]"), 8), "expected a whole number from 0, found 2.0"},
      {file_of(one("F32", "[\"2\"]", "[0,8]"), 8), "expected a whole number from 0, found \"2\""},
      {file_of(one("F32", "[18446744073709551615]", "[0,8]"), 8), "expected a whole number"},
      {file_of(one("F32", "[99999999999999999999999]", "[0,8]"), 8), "expected a whole number"},
      {file_of(one("F32", "[4611686018427387904,4]", "[0,0]"), 0), "overflows"},
      {file_of(one("F32", "[4294967296,4294967296,4294967296]", "[0,8]"), 8), "overflows"},
      {file_of(one("F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), 8), "9 dimensions; at most 8"},
      {file_of(one("F32", "[2]", "[8,0]"), 8), "bytes 8 to 0 of the data"},
      {file_of(one("F32", "[2]", "[0,8]"), 7), "the file has 7 bytes of it; truncated?"},
      {file_of(one("F32", "[2]", "[0,9223372036854775807]"), 8), "truncated?"},
      {file_of(one("F32", "[2]", "[9223372036854775800,9223372036854775807]"), 8), "truncated?"},
      {file_of(one("F32", "[3]", "[0,8]"), 8), "8 bytes; expected 12 for F32 of shape [3]"},
      {file_of(one("BF16", "[3,2]", "[0,8]"), 8), "expected 12 for BF16 of shape [3, 2]"},
      {file_of(one("F32", "[2]", "[4,12]"), 12), "begins at byte 4 of the data; expected 0"},
      {file_of(one("F32", "[2]", "[0,8]"), 9), "1 bytes after the last tensor"},
      {file_of(R"({"x":)" + good + R"(,"y":)" + tensor("F32", "[2]", "[4,12]") + "}", 12),
       R"(tensor "y" begins at byte 4 of the data; expected 8)"},
      {file_of(R"({"y":)" + good + R"(,"x":)" + tensor("F32", "[2]", "[12,20]") + "}", 20),
       R"(tensor "x" begins at byte 12 of the data; expected 8)"},
      {file_of(std::string(200, '[') + std::string(200, ']'), 0), "nested deeper than 64 levels"},
  };
  for (const Case& c : cases) require_refusal([&] { parse(c.bytes); }, "the file", c.message);
}

TEST_CASE("every cut of a safetensors file is refused", "[engine][hostile]") {
  const std::string whole = file_of(R"({"a":)" + tensor("F32", "[2]", "[0,8]") + R"(,"b":)" +
                                        tensor("BF16", "[1,2]", "[8,12]") + "}",
                                    12);
  REQUIRE(parse(whole).size() == 2);
  for (std::size_t n = 0; n < whole.size(); ++n) {
    INFO(n << " bytes");
    REQUIRE_THROWS_AS(parse(whole.substr(0, n)), InputError);
  }
}

TEST_CASE("tensors may stand in any order, be empty, and be of types that lie unread",
          "[engine][safetensors]") {
  const auto files = parse(file_of(
      R"({"__metadata__":{"format":"pt"},"z":)" + tensor("F32", "[1]", "[0,4]") + R"(,"a":)" +
          tensor("I64", "[1]", "[4,12]") + R"(,"e":)" + tensor("F16", "[0,7]", "[4,4]") + "}",
      12));
  CHECK(files.size() == 3);
  CHECK(files.at("a").type == FileType::other);
  CHECK(files.at("e").bytes.empty());
  for (const FileType type : {FileType::f32, FileType::f16, FileType::bf16})
    CHECK_NOTHROW(convert_to_f32({}, {}, type));
}

TEST_CASE("a bad model directory is refused with what and where", "[engine][hostile]") {
  const Folder folder;
  const auto& dir = folder.path;
  const auto open = [&] { TensorFiles::open(dir); };
  const auto index = [&](const std::string& text) {
    std::ofstream(dir / "model.safetensors.index.json") << text;
  };
  require_refusal(open, dir.string(), "neither model.safetensors nor model.safetensors.index.json");
  const std::string at = (dir / "model.safetensors.index.json").string();
  for (const auto& [text, message] : std::vector<std::pair<std::string, std::string>>{
           {"{}", "expected an object \"weight_map\""},
           {R"({"weight_map":[]})", "expected an object \"weight_map\""},
           {R"({"weight_map":{}})", "names no file"},
           {R"({"weight_map":{"x":3}})", R"(weight_map."x": expected a file name, found 3)"},
           {R"({"weight_map":{"x":"../a"}})", R"("../a" is not a plain file name)"},
           {R"({"weight_map":{"x":"/etc/passwd"}})", "is not a plain file name"},
           {R"({"weight_map":{"x":".."}})", "is not a plain file name"},
           {R"({"weight_map":{"x":""}})", "is not a plain file name"},
           {R"({"weight_map":{"x":"a\u0000b"}})", R"("a\u0000b" is not a plain file name)"}}) {
    index(text);
    require_refusal(open, at, message);
  }
  index(R"({"weight_map":{"x":"gone.safetensors"}})");
  require_refusal(open, dir.string(), "the shard gone.safetensors is missing");
  std::filesystem::create_directory(dir / "folder");
  index(R"({"weight_map":{"x":"folder"}})");
  require_refusal(open, dir.string(), "not a regular file");
  REQUIRE(::mkfifo((dir / "pipe").c_str(), 0600) == 0);
  index(R"({"weight_map":{"x":"pipe"}})");
  require_refusal(open, dir.string(), "not a regular file");
  const std::string shard = file_of(one("F32", "[2]", "[0,8]"), 8);
  std::ofstream(dir / "a") << shard;
  std::ofstream(dir / "b") << shard;
  index(R"({"weight_map":{"x":"a","y":"b"}})");
  require_refusal(open, dir.string(), R"(the tensor "x" stands in another shard too)");
  index(R"({"weight_map":{"x":"a"}})");
  const auto files = TensorFiles::open(dir);
  std::vector<float> two(2);
  require_refusal([&] { files.read_f32("y", two, {2}); }, dir.string(),
                  R"(the tensor "y" is missing)");
  require_refusal(
      [&] {
        files.read_f32("x", two, {1, 2});
      },
      dir.string(), R"(the tensor "x" has shape [2]; expected [1, 2])");
  std::ofstream(dir / "a") << file_of(one("I32", "[2]", "[0,8]"), 8);
  require_refusal([&] { TensorFiles::open(dir).read_f32("x", two, {2}); }, dir.string(),
                  R"(the tensor "x" is of type I32; expected F32, F16 or BF16)");
}

TEST_CASE("half and bfloat16 become the float32 they stand for", "[engine][safetensors]") {
  // All 65,536 patterns against arithmetic: sign, exponent, fraction as IEEE 754 defines them.
  std::vector<std::uint16_t> bits(65536);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
  for (const bool half : {true, false}) {
    std::vector<float> out(bits.size());
    convert_to_f32(out, std::as_bytes(std::span(bits)), half ? FileType::f16 : FileType::bf16);
    const int fraction_bits = half ? 10 : 7, exponent_bits = half ? 5 : 8;
    const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const int exponent = static_cast<int>(i >> fraction_bits) & top;
      const int fraction = static_cast<int>(i) & ((1 << fraction_bits) - 1);
      const double one_fraction = static_cast<double>(fraction) / (1 << fraction_bits);
      INFO("pattern " << i << (half ? " of F16" : " of BF16"));
      REQUIRE(std::signbit(out[i]) == (i >= 32768));
      if (exponent == top) {
        REQUIRE((fraction == 0 ? std::isinf(out[i]) : std::isnan(out[i])));
      } else {
        const double expected = exponent == 0 ? std::ldexp(one_fraction, 1 - bias)
                                              : std::ldexp(1 + one_fraction, exponent - bias);
        REQUIRE(static_cast<double>(std::abs(out[i])) == expected);
      }
    }
  }
}

TEST_CASE("a written file is read back; a full disk leaves what was there",
          "[engine][safetensors]") {
  const Folder folder;
  const auto& dir = folder.path;
  const auto file = dir / "x.safetensors";
  std::vector<float> numbers(600'000);
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>(i);
  const Tensor all(numbers.data(), {600, 1000}, DType::f32, Device::cpu);
  const std::vector<WriteTensor> tensors{{"whole", {600, 1000}, all},
                                         {"columns", {600, 7}, all.col_range(3, 10)}};
  const auto read_back = [&] {
    const auto files = TensorFiles::open_file(file);
    std::vector<float> found(600'000), columns(600 * 7);
    files.read_f32("whole", found, {600, 1000});
    files.read_f32("columns", columns, {600, 7});
    REQUIRE(found == numbers);
    REQUIRE(columns[7 * 599 + 6] == 599 * 1000 + 9);
  };
  write_safetensors(file, tensors);
  read_back();

  // A limit on the size of files stands in for a full disk: write() fails in the same way.
  struct rlimit before {};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  auto* const handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit small = before;
  small.rlim_cur = 1'500'000;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  std::string message;
  try {
    write_safetensors(file, tensors);
  } catch (const InputError& e) {
    message = e.what();
  }
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK_THAT(message, Catch::Matchers::StartsWith(file.string() + ": cannot be written: "));
  read_back();
  CHECK(std::distance(std::filesystem::directory_iterator(dir), {}) == 1);

  require_refusal([&] { write_safetensors(dir / "no" / "x", tensors); }, (dir / "no").string(),
                  "cannot be written: No such file or directory");
}
