// Table: rows of cells with a caption, and its renderings.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace mixlora {

enum class Format : std::uint8_t { terminal, markdown, csv, latex };

struct Table {
  std::string name, title, caption;
  std::vector<std::string> columns;            // the first column names the row
  std::vector<std::vector<std::string>> rows;  // as many cells as columns
};

std::string render(const Table& table, Format format);

}  // namespace mixlora
