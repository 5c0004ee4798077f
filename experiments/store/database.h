// SQLite as RAII: a connection, a prepared statement, a transaction that rolls back unless
// committed.
#pragma once
#include <concepts>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <sqlite3.h>

#include "engine/error.h"

namespace mixlora {

/// What SQLite said, and about which file or statement; exit code 2.
struct StoreError : InputError {
  using InputError::InputError;
};

enum class Access : std::uint8_t { read, write };

/// Throws what SQLite said last of `db`, with the file's name and what to do about it.
[[noreturn]] void store_error(sqlite3* db, std::string_view statement = "");

class Database {
 public:
  /// Opens a file; Access::write makes it when it is not there. Throws StoreError.
  explicit Database(const std::string& path, Access access = Access::write);
  void exec(const char* sql) {
    if (sqlite3_exec(db_.get(), sql, nullptr, nullptr, nullptr) != SQLITE_OK)
      store_error(db_.get(), sql);
  }
  sqlite3* raw() const { return db_.get(); }

 private:
  struct Close {
    void operator()(sqlite3* db) const { sqlite3_close_v2(db); }
  };
  std::unique_ptr<sqlite3, Close> db_;
};

/// One prepared statement. `run(args...)` binds all and steps; `rows<T...>(fn, args...)` visits
/// results.
class Statement {
 public:
  Statement(const Database& db, std::string_view sql) {
    sqlite3_stmt* s = nullptr;
    if (sqlite3_prepare_v2(db.raw(), sql.data(), int(sql.size()), &s, nullptr) != SQLITE_OK)
      store_error(db.raw(), sql);
    stmt_.reset(s);
  }

  template <class... Args> void run(const Args&... args) {
    rows<>([] {}, args...);
  }

  template <class... Columns, class Fn, class... Args> void rows(Fn&& fn, const Args&... args) {
    Reset reset{stmt_.get()};  // also when fn throws
    if (sqlite3_bind_parameter_count(stmt_.get()) != int(sizeof...(Args)))
      throw StoreError(std::string(sqlite3_sql(stmt_.get())) + ": wrong number of parameters");
    int i = 0;
    (bind(++i, args), ...);
    int rc;
    while ((rc = sqlite3_step(stmt_.get())) == SQLITE_ROW) {
      [&]<std::size_t... I>(std::index_sequence<I...>) { fn(column<Columns>(int(I))...); }
      (std::index_sequence_for<Columns...>{});
    }
    if (rc != SQLITE_DONE) store_error(sqlite3_db_handle(stmt_.get()), sqlite3_sql(stmt_.get()));
  }

 private:
  struct Finalize {
    void operator()(sqlite3_stmt* s) const { sqlite3_finalize(s); }
  };
  struct Reset {
    sqlite3_stmt* s;
    ~Reset() {
      sqlite3_reset(s);
      sqlite3_clear_bindings(s);
    }
  };

  void bind(int i, std::nullptr_t) { ok(sqlite3_bind_null(stmt_.get(), i)); }
  void bind(int i, std::integral auto v) { ok(sqlite3_bind_int64(stmt_.get(), i, v)); }
  void bind(int i, std::floating_point auto v) { ok(sqlite3_bind_double(stmt_.get(), i, v)); }
  void bind(int i, std::string_view v) {
    ok(sqlite3_bind_text(stmt_.get(), i, v.data(), int(v.size()), SQLITE_TRANSIENT));
  }
  template <class T> void bind(int i, const std::optional<T>& v) {
    v ? bind(i, *v) : bind(i, nullptr);
  }

  template <class T> T column(int i) const {
    if constexpr (std::integral<T>)
      return T(sqlite3_column_int64(stmt_.get(), i));
    else if constexpr (std::floating_point<T>)
      return T(sqlite3_column_double(stmt_.get(), i));
    else {
      const auto* text = reinterpret_cast<const char*>(
          sqlite3_column_text(stmt_.get(), i));  // NOLINT: SQLite's UTF-8
      return T(text == nullptr ? "" : text, std::size_t(sqlite3_column_bytes(stmt_.get(), i)));
    }
  }
  void ok(int rc) const {
    if (rc != SQLITE_OK) store_error(sqlite3_db_handle(stmt_.get()), sqlite3_sql(stmt_.get()));
  }

  std::unique_ptr<sqlite3_stmt, Finalize> stmt_;
};

/// Rolls back unless committed.
class Transaction {
 public:
  explicit Transaction(Database& db) : db_(db) { db_.exec("BEGIN IMMEDIATE"); }
  ~Transaction() {
    if (open_) sqlite3_exec(db_.raw(), "ROLLBACK", nullptr, nullptr, nullptr);
  }
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;
  void commit() {
    db_.exec("COMMIT");
    open_ = false;
  }

 private:
  Database& db_;
  bool open_ = true;
};

}  // namespace mixlora
