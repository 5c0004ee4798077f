#include "reports/table.h"

#include <algorithm>
#include <array>
#include <string_view>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "engine/error.h"
#include "engine/nearest.h"

namespace mixlora {
namespace {

constexpr std::size_t kLine = 100;  // characters of a caption's line on a terminal

/// Characters a terminal shows: UTF-8 continuation bytes count nothing.
std::size_t width(const std::string& s) {
  return static_cast<std::size_t>(std::count_if(
      s.begin(), s.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) != 0x80; }));
}
std::string padded(const std::string& s, std::size_t to, bool left) {
  const std::string space(to - std::min(to, width(s)), ' ');
  return left ? s + space : space + s;
}
std::string replaced(std::string text, std::string_view from, std::string_view to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
  return text;
}

using Lines = std::vector<std::vector<std::string>>;  // the heading first

template <class Text> Lines lines_of(const Table& t, Text&& text) {
  Lines out{{}};
  for (const auto& c : t.columns) out.front().push_back(text(Cell(c)));
  for (const TableRow& row : t.rows) {
    auto& line = out.emplace_back();
    for (const Cell& c : row.cells) line.push_back(text(c));
  }
  return out;
}
std::vector<std::size_t> widths(const Lines& lines) {
  std::vector<std::size_t> w(lines.front().size());
  for (const auto& line : lines)
    for (std::size_t i = 0; i < line.size(); ++i) w[i] = std::max(w[i], width(line[i]));
  return w;
}
bool is_left(const Table& t, std::size_t column) {
  return column == 0 || std::find(t.words.begin(), t.words.end(), column) != t.words.end();
}
/// Whether a rule stands above this row: where its kind changes.
bool starts_group(const Table& t, std::size_t row) {
  return row > 0 && t.rows[row].kind != t.rows[row - 1].kind;
}

std::string wrapped(const std::string& text) {
  std::string out, line;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t space = std::min(text.find(' ', at), text.size());
    const std::string word = text.substr(at, space - at);
    if (!line.empty() && width(line) + 1 + width(word) > kLine) {
      out += line + "\n";
      line.clear();
    }
    line += (line.empty() ? "" : " ") + word;
    at = space + 1;
  }
  return line.empty() ? out : out + line + "\n";
}

std::string terminal(const Table& t) {
  const Lines lines = lines_of(t, [](const Cell& c) { return c.text; });
  const auto w = widths(lines);
  std::size_t total = 2 * (w.size() - 1);
  for (const auto one : w) total += one;
  std::string rule;
  for (std::size_t i = 0; i < total; ++i) rule += "─";
  std::string out = t.title + "\n";
  for (std::size_t r = 0; r < lines.size(); ++r) {
    if (r == 1 || (r > 1 && starts_group(t, r - 1))) out += rule + "\n";
    std::string line;
    for (std::size_t i = 0; i < w.size(); ++i)
      line += (i > 0 ? "  " : "") + padded(lines[r][i], w[i], is_left(t, i));
    out += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return out + wrapped(t.caption);
}

std::string markdown(const Table& t) {
  const Lines lines = lines_of(t, [](const Cell& c) {
    const std::string text = replaced(c.text, "|", "\\|");
    return c.mark == Mark::best ? "**" + text + "**" : text;
  });
  const auto w = widths(lines);
  std::string out = "### " + t.title + "\n\n";
  for (std::size_t r = 0; r < lines.size(); ++r) {
    for (std::size_t i = 0; i < w.size(); ++i)
      out += (i > 0 ? " | " : "| ") + padded(lines[r][i], w[i], is_left(t, i));
    out += " |\n";
    if (r > 0) continue;
    for (std::size_t i = 0; i < w.size(); ++i)
      out.append(is_left(t, i) ? "|:" : "|").append(w[i] + 1, '-').append(is_left(t, i) ? "" : ":");
    out += "|\n";
  }
  return out + (t.caption.empty() ? "" : "\n" + t.caption + "\n");
}

std::string quoted(const std::string& s) {
  if (s.find_first_of(",\"\n\r") == std::string::npos) return s;
  std::string out = "\"";
  out += replaced(s, "\"", "\"\"");
  return out += '"';
}
/// Numbers without their decoration; a column with errors gets a second one for them.
std::string csv(const Table& t) {
  std::vector<bool> with_error(t.columns.size());
  for (const TableRow& row : t.rows)
    for (std::size_t i = 0; i < row.cells.size(); ++i)
      with_error[i] = with_error[i] || row.cells[i].error.has_value();
  const auto number = [](const std::optional<double>& v) {
    return v ? fmt::format("{:.10g}", *v) : std::string();
  };
  std::string out;
  for (std::size_t i = 0; i < t.columns.size(); ++i) {
    if (i > 0) out += ',';
    out += quoted(t.columns[i]);
    if (with_error[i]) out.append(",").append(quoted(t.columns[i] + " se"));
  }
  out += "\n";
  for (const TableRow& row : t.rows) {
    for (std::size_t i = 0; i < row.cells.size(); ++i) {
      const Cell& c = row.cells[i];
      if (i > 0) out += ',';
      out += c.value ? number(c.value) : quoted(c.text);
      if (with_error[i]) out.append(",").append(number(c.error));
    }
    out += "\n";
  }
  return out;
}

std::string escaped(const std::string& s) {
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 9> kSigns{
      {{"±", "$\\pm$"},
       {"†", "$\\dagger$"},
       {"Δ", "$\\Delta$"},
       {"×", "$\\times$"},
       {"−", "$-$"},
       {"≥", "$\\geq$"},
       {"≤", "$\\leq$"},
       {"µ", "$\\mu$"},
       {"●", "$\\bullet$"}}};
  std::string out;
  for (const char c : s) {
    if (c == '\\')
      out += "\\textbackslash{}";
    else if (c == '~' || c == '^')
      out += std::string("\\") + c + "{}";
    else
      out += std::string_view("&%$#_{}").find(c) == std::string_view::npos ? std::string(1, c)
                                                                           : std::string("\\") + c;
  }
  for (const auto& [sign, command] : kSigns) out = replaced(out, sign, command);
  return out;
}
std::string latex(const Table& t) {
  const Lines lines = lines_of(t, [](const Cell& c) {
    const std::string text = escaped(c.text);
    return c.mark == Mark::best     ? "\\textbf{" + text + "}"
           : c.mark == Mark::second ? "\\underline{" + text + "}"
                                    : text;
  });
  std::string columns;
  for (std::size_t i = 0; i < t.columns.size(); ++i) columns += is_left(t, i) ? 'l' : 'r';
  std::string out = "% needs \\usepackage{booktabs}\n\\begin{table}\n\\centering\n\\caption{" +
                    escaped(t.title + ". " + t.caption) + "}\n\\label{tab:" + t.name +
                    "}\n\\begin{tabular}{" + columns + "}\n\\toprule\n";
  for (std::size_t r = 0; r < lines.size(); ++r) {
    if (r == 1 || (r > 1 && starts_group(t, r - 1))) out += "\\midrule\n";
    for (std::size_t i = 0; i < lines[r].size(); ++i) out += (i > 0 ? " & " : "") + lines[r][i];
    out += " \\\\\n";
  }
  return out + "\\bottomrule\n\\end{tabular}\n\\end{table}\n";
}

const char* name_of(RowKind kind) {
  switch (kind) {
    case RowKind::own:
      return "own";
    case RowKind::reference:
      return "reference";
    case RowKind::published:
      return "published";
  }
  return "";
}

}  // namespace

Format format_named(const std::string& name) {
  if (name == "terminal" || name == "txt") return Format::terminal;
  if (name == "markdown" || name == "md") return Format::markdown;
  if (name == "csv") return Format::csv;
  if (name == "latex" || name == "tex") return Format::latex;
  if (name == "json") return Format::json;
  fail("no format \"{}\"; {}", name,
       nearest(name, {"terminal", "markdown", "csv", "latex", "json"}));
}

const char* ending_of(Format format) {
  switch (format) {
    case Format::terminal:
      return ".txt";
    case Format::markdown:
      return ".md";
    case Format::csv:
      return ".csv";
    case Format::latex:
      return ".tex";
    case Format::json:
      return ".json";
  }
  return "";
}

Cell number_cell(const std::optional<double>& v, int decimals, double divide) {
  if (!v) return {"-"};
  return {fmt::format("{:.{}f}", *v / divide, decimals), *v / divide};
}

void mark_best(Table& table) {
  for (std::size_t i = 1; i < table.columns.size(); ++i) {
    std::vector<double> values;
    for (const TableRow& row : table.rows)
      if (row.kind == RowKind::own && row.cells[i].value) values.push_back(*row.cells[i].value);
    if (values.size() < 2) continue;
    std::sort(values.rbegin(), values.rend());
    const double best = values.front();
    const auto below =
        std::find_if(values.begin(), values.end(), [&](double v) { return v < best; });
    for (TableRow& row : table.rows) {
      Cell& c = row.cells[i];
      if (row.kind != RowKind::own || !c.value || below == values.end()) continue;
      c.mark = *c.value == best ? Mark::best : *c.value == *below ? Mark::second : Mark::none;
    }
  }
}

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
    case Format::json:
      return to_json(table).dump(1) + "\n";
  }
  return {};
}

nlohmann::json to_json(const Table& table) {
  nlohmann::json rows = nlohmann::json::array();
  for (const TableRow& row : table.rows) {
    nlohmann::json cells = nlohmann::json::array();
    for (const Cell& c : row.cells) {
      nlohmann::json cell = {{"text", c.text}};
      const auto put = [&](const char* key, const std::optional<double>& v) {
        if (v) cell[key] = *v;
      };
      put("value", c.value);
      put("error", c.error);
      put("low", c.low);
      put("high", c.high);
      if (c.mark != Mark::none) cell["mark"] = c.mark == Mark::best ? "best" : "second";
      cells.push_back(std::move(cell));
    }
    rows.push_back({{"kind", name_of(row.kind)}, {"cells", std::move(cells)}});
  }
  return {{"name", table.name},
          {"title", table.title},
          {"caption", table.caption},
          {"columns", table.columns},
          {"rows", std::move(rows)}};
}

}  // namespace mixlora
