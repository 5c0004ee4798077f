// SHA-256 [FIPS 180-4], for fingerprints of data and specs.
#pragma once
#include <string>
#include <string_view>

namespace mixlora {

/// 64 hexadecimal digits.
std::string sha256(std::string_view bytes);

}  // namespace mixlora
