#include "suites/fetch.h"

#include <algorithm>

#include <nlohmann/json.hpp>

#include "engine/atomic_file.h"
#include "engine/error.h"
#include "engine/fields.h"
#include "engine/json_file.h"
#include "suites/dataset.h"
#include "suites/parquet.h"
#include "suites/validate.h"

namespace mixlora {
namespace {

namespace fs = std::filesystem;
constexpr std::size_t kMaxFile = std::size_t{1} << 30;

std::string config_of(const Task& task, const Split& split) {
  return split.config.empty() ? task.source.config : split.config;
}
std::string official_name(const Split& split) {
  return split.official.empty() ? split.name : split.official;
}

bool is_rows(const fs::path& file) {
  const std::string name = file.filename().string();
  return name.ends_with(".jsonl") || name.ends_with(".jsonl.gz");
}

/// Files of a folder that satisfy `wanted`, by name.
template <class Wanted> std::vector<fs::path> files_in(const fs::path& folder, Wanted&& wanted) {
  std::vector<fs::path> out;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(folder, none))
    if (entry.is_regular_file(none) && wanted(entry.path())) out.push_back(entry.path());
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<fs::path> local_files(const Task& task, const Split& split, const fs::path& from) {
  require(fs::is_directory(from), "--from {}: no such folder", from.string());
  const std::string config = config_of(task, split), name = official_name(split);
  const auto parquet = [](const fs::path& f) { return f.extension() == ".parquet"; };
  const auto of_split = [&](const fs::path& f) {
    const std::string file = f.filename().string();
    return parquet(f) && (file.starts_with(name + "-") || file == name + ".parquet");
  };
  const auto rows = [&](const fs::path& f) {
    const std::string file = f.filename().string(), stem = file.substr(0, file.find('.'));
    return is_rows(f) && (stem == split.file || (config.empty() && stem == name));
  };
  std::string looked;
  std::vector<fs::path> roots{from / task.source.repository,
                              from / fs::path(task.source.repository).filename(),
                              from / task.folder, from};
  for (const fs::path& root : roots) {
    for (const fs::path& folder : {root / config, root})
      for (const auto& found :
           {files_in(folder / name, parquet), files_in(folder, of_split), files_in(folder, rows)})
        if (!found.empty()) return found;
    looked += (looked.empty() ? "" : ", ") + root.string();
  }
  fail("task {}: split \"{}\": no {}/*.parquet, {}-*.parquet or {}.jsonl in {}", task.name,
       split.name, name, name, split.file, looked);
}

/// Records of a Parquet file or of JSON lines; rows of ours are told by their key "choices" beside
/// "labels" and "answer".
std::vector<Json> records_of(const fs::path& file, const Source& source) {
  if (!is_rows(file))
    return read_parquet(read_text(file, kMaxFile), file.string(), columns_of(source));
  std::vector<Json> out;
  const std::string text = read_lines(file);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = std::string_view(text).substr(at, end - at);
    at = end + 1;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    out.push_back(parse_json(line, fmt::format("{}:{}", file.string(), out.size() + 1)));
  }
  return out;
}

bool is_own_row(const Json& record) {
  return record.is_object() && record.size() == 6 && record.contains("labels") &&
         record.contains("answer") && record.contains("choices") && record.contains("id");
}

std::string rows_text(const Task& task, const Split& split, const std::vector<fs::path>& files) {
  std::string text;
  std::int64_t place = 0;
  for (const fs::path& file : files)
    for (const Json& record : records_of(file, task.source)) {
      const std::string id = fmt::format("{}-{}-{}", task.folder, split.name, place++);
      const std::string where = fmt::format("{}: row {}", file.string(), place);
      text += (is_own_row(record) ? record : row_of(task.source, record, id, where)).dump() + "\n";
    }
  return text;
}

/// Refuses what is not on record.
std::string checked(const Task& task, const Split& split, const Dataset& data, bool any_edition) {
  const auto rows = static_cast<std::int64_t>(data.rows.size());
  require(any_edition || split.rows == 0 || rows == split.rows,
          "task {}: split \"{}\": {} rows, {} on record; nothing was written (--any-edition takes "
          "them all the same)",
          task.name, split.name, rows, split.rows);
  const std::string hash = content_hash(data);
  const HashState state = compare_hash(split, hash);
  require(any_edition || state != HashState::differs,
          "task {}: split \"{}\": the rows' hash is {}, {} on record; nothing was written "
          "(--any-edition takes them all the same)",
          task.name, split.name, hash, split.sha256);
  return fmt::format("{} rows, hash {}", rows, write(state).get<std::string>());
}

}  // namespace

std::string fetch_split(const Task& task, const Split& split, const FetchOptions& options,
                        const Hub& hub) {
  require(!task.source.repository.empty(), "task {} has no source to fetch from", task.name);
  const fs::path stem = options.data / task.folder / split.file, target = stem.string() + ".jsonl";
  for (const char* ending : {".jsonl", ".jsonl.gz"})
    if (const fs::path file = stem.string() + ending; fs::exists(file) && !options.again)
      return fmt::format("{} is there", file.string());
  std::error_code error;
  fs::create_directories(target.parent_path(), error);
  require(!error, "{}: the folder cannot be made: {}", target.parent_path().string(),
          error.message());

  std::vector<fs::path> files, downloaded;
  if (!options.from.empty()) {
    files = local_files(task, split, options.from);
  } else {
    const Source& s = task.source;
    for (const HubFile& f :
         hub.parquet_files(s.repository, config_of(task, split), official_name(split))) {
      // The hash in the name keeps parts of different files apart.
      files.push_back(fmt::format("{}.{}.{}.parquet", stem.string(), files.size(),
                                  f.sha256.empty() ? "download" : f.sha256.substr(0, 12)));
      if (!fs::exists(files.back())) hub.download(s.repository, f, files.back());
    }
    downloaded = files;
  }
  const std::string text = rows_text(task, split, files);
  const Dataset data = parse_dataset(text, files.front().string());
  const std::string what = checked(task, split, data, options.any_edition);
  AtomicFile out(target);
  out.write(text);
  out.commit();
  for (const fs::path& file : downloaded) fs::remove(file, error);
  return fmt::format("{}: {}", target.string(), what);
}

}  // namespace mixlora
