#include "reports/table.h"

#include <algorithm>

#include <fmt/format.h>

namespace mixlora {
namespace {

/// Characters a terminal shows: UTF-8 continuation bytes count nothing.
std::size_t width(const std::string& s) {
  return static_cast<std::size_t>(std::count_if(
      s.begin(), s.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80; }));
}
std::string padded(const std::string& s, std::size_t to, bool left) {
  const std::string space(to - std::min(to, width(s)), ' ');
  return left ? s + space : space + s;
}
std::vector<std::size_t> widths(const Table& t) {
  std::vector<std::size_t> w;
  for (const auto& c : t.columns) w.push_back(width(c));
  for (const auto& row : t.rows)
    for (std::size_t i = 0; i < row.size(); ++i) w[i] = std::max(w[i], width(row[i]));
  return w;
}

std::string aligned(const Table& t, const char* edge, const char* between,
                    const std::string& rule) {
  const auto w = widths(t);
  std::string out;
  const auto line = [&](const std::vector<std::string>& cells) {
    out += edge;
    for (std::size_t i = 0; i < cells.size(); ++i)
      out += (i > 0 ? between : "") + padded(cells[i], w[i], i == 0);
    out += std::string(edge[0] == '|' ? " |" : "") + "\n";
  };
  line(t.columns);
  out += rule;
  for (const auto& row : t.rows) line(row);
  return out;
}

std::string terminal(const Table& t) {
  std::size_t total = 2 * (t.columns.size() - 1);
  for (const auto w : widths(t)) total += w;
  std::string rule;
  for (std::size_t i = 0; i < total; ++i) rule += "─";
  return t.title + "\n" + aligned(t, "", "  ", rule + "\n") + t.caption + "\n";
}
std::string markdown(const Table& t) {
  std::string rule = "|";
  const auto w = widths(t);
  for (std::size_t i = 0; i < w.size(); ++i)
    rule += std::string(i == 0 ? ":" : "-") + std::string(w[i], '-') + (i == 0 ? "-|" : ":|");
  return "### " + t.title + "\n\n" + aligned(t, "| ", " | ", rule + "\n") + "\n" + t.caption + "\n";
}
std::string quoted(const std::string& s) {
  if (s.find_first_of(",\"\n") == std::string::npos) return s;
  std::string out = "\"";
  for (const char c : s) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + "\"";
}
std::string csv(const Table& t) {
  std::string out;
  const auto line = [&](const std::vector<std::string>& cells) {
    for (std::size_t i = 0; i < cells.size(); ++i) out += (i > 0 ? "," : "") + quoted(cells[i]);
    out += "\n";
  };
  line(t.columns);
  for (const auto& row : t.rows) line(row);
  return out;
}
std::string escaped(const std::string& s) {
  std::string out;
  for (std::size_t i = 0; i < s.size(); ++i) {
    if (s.compare(i, 2, "\xc2\xb1") == 0) {  // plus-minus
      out += "$\\pm$";
      ++i;
    } else if (std::string_view("&%$#_{}").find(s[i]) != std::string_view::npos) {
      out += std::string("\\") + s[i];
    } else {
      out += s[i];
    }
  }
  return out;
}
std::string latex(const Table& t) {
  std::string out = "\\begin{table}\n\\caption{" + escaped(t.title + ". " + t.caption) +
                    "}\n\\begin{tabular}{l" + std::string(t.columns.size() - 1, 'r') +
                    "}\n\\toprule\n";
  const auto line = [&](const std::vector<std::string>& cells) {
    for (std::size_t i = 0; i < cells.size(); ++i) out += (i > 0 ? " & " : "") + escaped(cells[i]);
    out += " \\\\\n";
  };
  line(t.columns);
  out += "\\midrule\n";
  for (const auto& row : t.rows) line(row);
  return out + "\\bottomrule\n\\end{tabular}\n\\end{table}\n";
}

}  // namespace

std::string render(const Table& table, Format format) {
  switch (format) {
    case Format::terminal:
      return terminal(table);
    case Format::markdown:
      return markdown(table);
    case Format::csv:
      return csv(table);
    case Format::latex:
      return latex(table);
  }
  return {};
}

}  // namespace mixlora
