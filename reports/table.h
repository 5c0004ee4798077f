// Table: rows of cells with a caption, and its renderings.
#pragma once
#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace mixlora {

enum class Format : std::uint8_t { terminal, markdown, csv, latex, json };
/// "terminal", "markdown" (or "md"), "csv", "latex" (or "tex"), "json"; throws InputError.
Format format_named(const std::string& name);
/// ".md", ".csv", ".tex", ".json", ".txt".
const char* ending_of(Format format);

enum class Mark : std::uint8_t { none, best, second };

/// What a person reads, and the numbers behind it for sorting, plotting and programs.
struct Cell {
  std::string text;
  std::optional<double> value, error, low, high;  // low, high: an interval
  Mark mark = Mark::none;

  Cell() = default;
  Cell(std::string t) : text(std::move(t)) {}  // NOLINT: most cells are a text
  Cell(const char* t) : text(t) {}             // NOLINT
  Cell(std::string t, std::optional<double> v, std::optional<double> e = std::nullopt)
      : text(std::move(t)), value(v), error(e) {}
};

/// reference: majority answer, untrained model; published: a source's numbers, not measured here.
enum class RowKind : std::uint8_t { own, reference, published };

struct TableRow {
  std::vector<Cell> cells;
  RowKind kind = RowKind::own;

  TableRow() = default;
  TableRow(std::initializer_list<Cell> c) : cells(c) {}
  TableRow(std::vector<Cell> c, RowKind k = RowKind::own)
      : cells(std::move(c)), kind(k) {}                    // NOLINT
  template <std::same_as<std::vector<std::string>> Texts>  // a template, so that braces mean cells
  TableRow(const Texts& texts) : cells(texts.begin(), texts.end()) {}  // NOLINT
};

struct Table {
  std::string name, title, caption;
  std::vector<std::string> columns;     // the first column names the row
  std::vector<TableRow> rows;           // as many cells as columns
  std::vector<std::size_t> words = {};  // columns of words, aligned left as the first is
};

/// A number as a cell: "12.3", "-" when absent.
Cell number_cell(const std::optional<double>& v, int decimals, double divide = 1);
/// Marks the highest and the second value of every column but the first, among own rows; a column
/// with one own value has none. Cells without a value take no part.
void mark_best(Table& table);

std::string render(const Table& table, Format format);
/// {"name", "title", "caption", "columns", "rows": [{"kind", "cells": [{"text", "value", ...}]}]}
nlohmann::json to_json(const Table& table);

}  // namespace mixlora
