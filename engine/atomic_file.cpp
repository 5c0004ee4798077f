#include "engine/atomic_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include <fcntl.h>
#include <unistd.h>

#include "engine/error.h"

namespace mixlora {
namespace {
constexpr std::size_t kBuffer = std::size_t{1} << 20;
}

AtomicFile::AtomicFile(const std::filesystem::path& file)
    : file_(file.string()), temporary_(file_ + ".part") {
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  require(descriptor_ >= 0, "{}: cannot be written: {}", temporary_, std::strerror(errno));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::write(std::string_view bytes) {
  if (buffer_.size() + bytes.size() > kBuffer) flush();
  buffer_ += bytes;
  if (buffer_.size() > kBuffer) flush();
}

void AtomicFile::flush() {
  for (std::string_view rest = buffer_; !rest.empty();) {
    const ssize_t n = ::write(descriptor_, rest.data(), rest.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) broken(errno);
    rest.remove_prefix(static_cast<std::size_t>(n));
  }
  buffer_.clear();
}

void AtomicFile::sync() {
  flush();
  if (::fsync(descriptor_) != 0) broken(errno);
}

void AtomicFile::commit() {
  sync();
  if (std::rename(temporary_.c_str(), file_.c_str()) != 0) broken(errno);
  ::close(descriptor_);
  descriptor_ = -1;
}

void AtomicFile::broken(int error) const {
  fail("{}: cannot be written: {}; nothing was left there", file_, std::strerror(error));
}

}  // namespace mixlora
