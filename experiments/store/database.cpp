#include "experiments/store/database.h"

#include <filesystem>

#include <unistd.h>

namespace mixlora {
namespace {

/// What to do about an error, by SQLite's primary code; empty when its own words say enough.
std::string_view advice(int code) {
  switch (code) {
    case SQLITE_FULL:
      return "the disk is full; make room and give the same command again";
    case SQLITE_IOERR:
      return "the disk does not take or give data (full, over a quota, or gone); what was "
             "committed is kept: give the same command again";
    case SQLITE_READONLY:
      return "it, or its folder, is read-only; give another file with --db, or copy it";
    case SQLITE_PERM:
    case SQLITE_CANTOPEN:
      return "it cannot be opened; is its folder there and writable?";
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      return "another process is writing to it; wait for it";
    case SQLITE_NOTADB:
      return "not a store of this program";
    case SQLITE_CORRUPT:
      return "it is damaged; take a copy from before, or run into a new file";
    default:
      return "";
  }
}

/// Readers of a WAL database write beside it; where that cannot be and no run has left anything
/// there, the file is read as one that never changes.
std::string reading_name(const std::string& path) {
  const auto folder = std::filesystem::absolute(path).parent_path();
  std::error_code error;
  if (::access(folder.c_str(), W_OK) == 0 || std::filesystem::exists(path + "-wal", error))
    return path;
  std::string uri = "file:";
  for (const char c : std::filesystem::absolute(path).string())
    uri += c == '?' || c == '#' || c == '%' ? fmt::format("%{:02x}", c) : std::string(1, c);
  return uri + "?immutable=1";
}

}  // namespace

void store_error(sqlite3* db, std::string_view statement) {
  const std::string said = sqlite3_errmsg(db);
  const char* file = sqlite3_db_filename(db, "main");
  const std::string name =
      file == nullptr || *file == '\0' ? "store" : std::filesystem::proximate(file).string();
  const auto hint = advice(sqlite3_errcode(db) & 0xFF);
  if (!hint.empty()) throw StoreError(fmt::format("{}: {} ({})", name, hint, said));
  throw StoreError(fmt::format("{}: {}{}{}", name, said, statement.empty() ? "" : " in ",
                               statement.substr(0, 200)));
}

Database::Database(const std::string& path, Access access) {
  sqlite3* db = nullptr;
  const bool reads = access == Access::read;
  const int flags = reads ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE;
  const std::string name = reads ? reading_name(path) : path;
  const int rc = sqlite3_open_v2(name.c_str(), &db, flags | SQLITE_OPEN_URI, nullptr);
  db_.reset(db);  // even on failure: SQLite wants it closed
  if (rc != SQLITE_OK) store_error(db);
  exec("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = ON;");
}

}  // namespace mixlora
