// The sweep file's JSON schema, for editors, from the same field table that reads it.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "experiments/sweep_file.h"

namespace mixlora {

/// JSON Schema (2020-12) of a sweep file. A field without a description, or a description without
/// its field, is a std::logic_error.
Json sweep_schema();

}  // namespace mixlora
