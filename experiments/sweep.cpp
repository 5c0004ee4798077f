#include "experiments/sweep.h"

#include <algorithm>

#include "engine/error.h"
#include "engine/nearest.h"

namespace mixlora {
namespace {

constexpr std::size_t kMostBytes = 16 << 20;

/// The name becomes part of file names (runs/NAME.db).
bool is_file_name(const std::string& name) {
  return !name.empty() && name.size() <= 100 && name.front() != '.' && name.front() != '-' &&
         std::all_of(name.begin(), name.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
         });
}

}  // namespace

Sweep parse_sweep(const Json& json, const std::string& file) {
  SweepFile parts;
  try {
    read(json, parts, "");
  } catch (const InputError& e) {  // ".axes[0].name: ..." or ": unknown key ..."
    const std::string text = e.what();
    fail("{}{}", file, text.starts_with('.') ? ": " + text.substr(1) : text);
  }
  require(is_file_name(parts.name),
          "{}: name: \"{}\"; expected 1 to 100 letters, digits, \"-\", \"_\" or \".\" (files are "
          "called after it)",
          file, parts.name);
  require(!parts.run.memory_limit_gib || *parts.run.memory_limit_gib > 0,
          "{}: run.memory_limit_gib: {}; expected more than 0, or null for what the device has",
          file, parts.run.memory_limit_gib.value_or(0));
  require(parts.run.save_every_seconds >= 0,
          "{}: run.save_every_seconds: {}; expected 0 (never) or more", file,
          parts.run.save_every_seconds);
  const auto& known = table_names();
  for (std::size_t i = 0; i < parts.tables.size(); ++i)
    if (std::find(known.begin(), known.end(), parts.tables[i]) == known.end())
      fail("{}: tables[{}]: no table \"{}\"; {}", file, i, parts.tables[i],
           nearest(parts.tables[i], known));
  Expansion e = expand(parts, file);
  return {parts.name,
          file,
          json,
          parts.run,
          parts.tables.empty() ? known : parts.tables,
          std::move(e.trials),
          std::move(e.left_out)};
}

Sweep read_sweep(const std::filesystem::path& file) {
  return parse_sweep(read_json(file, kMostBytes), file.string());
}

}  // namespace mixlora
