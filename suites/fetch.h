// Fetch: a task's official rows, brought into the data directory: found, checked, converted.
#pragma once
#include <filesystem>
#include <functional>
#include <string>

#include "suites/hub.h"
#include "suites/task.h"

namespace mixlora {

struct FetchOptions {
  std::filesystem::path data;  // where suites lie; FOLDER/FILE.jsonl is written below it
  std::filesystem::path from;  // a folder of official files instead of the Hub; empty: the Hub
  bool again = false;          // also splits that are there
  bool any_edition = false;    // also rows whose hash or count is not the one on record
};

/// Brings one split; returns what was done, for people. Throws InputError, and leaves what was
/// there, when a file is not to be had or not what it must be.
///
/// In `from` a split's files are looked for as the Hub lays them out
/// (REPOSITORY/CONFIG/SPLIT/*.parquet, REPOSITORY/CONFIG/SPLIT-*.parquet) and as plain rows
/// (FOLDER/FILE.jsonl, official fields or ours), with the repository's last name, the task's folder
/// or nothing for REPOSITORY.
std::string fetch_split(const Task& task, const Split& split, const FetchOptions& options,
                        const Hub& hub);

}  // namespace mixlora
