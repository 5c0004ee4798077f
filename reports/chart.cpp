#include "reports/chart.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace mixlora {
namespace {

using Json = nlohmann::json;

constexpr double kWidth = 640, kLeft = 56, kRight = 16, kTop = 12, kBottom = 44;
constexpr int kColours = 8;  // of the style sheet
constexpr int kTicks = 6;

std::string px(double v) { return fmt::format("{:.1f}", v); }

/// A straight map from values to pixels.
struct Scale {
  double low = 0, high = 1, from = 0, to = 1;
  double operator()(double v) const { return from + (v - low) / (high - low) * (to - from); }
};

struct Range {
  double low = std::numeric_limits<double>::infinity(),
         high = -std::numeric_limits<double>::infinity();
  void add(double v) {
    low = std::min(low, v);
    high = std::max(high, v);
  }
  void pad(double share) {
    const double by = high > low ? share * (high - low) : std::max(1e-9, std::abs(high) * share);
    low -= by;
    high += by;
  }
};

/// "12", "0.05": as many decimals as a step needs.
std::string tick_text(double v, double step) {
  const int decimals = std::max(0, static_cast<int>(std::ceil(-std::log10(step) - 1e-9)));
  return fmt::format("{:.{}f}", v == 0 ? 0.0 : v, decimals);
}
Json tick_list(const Scale& s, const std::vector<double>& at) {
  Json out = Json::array();
  const double step = at.size() > 1 ? at[1] - at[0] : 1;
  for (const double v : at) out.push_back({{"at", px(s(v))}, {"text", tick_text(v, step)}});
  return out;
}

/// A label of at most `most` characters.
std::string shortened(const std::string& label, std::size_t most) {
  const auto starts = [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; };
  if (static_cast<std::size_t>(std::count_if(label.begin(), label.end(), starts)) <= most)
    return label;
  std::size_t end = 0, characters = 0;
  while (end < label.size() && (!starts(label[end]) || ++characters < most)) ++end;
  return label.substr(0, end) + "…";
}

Json frame(double height) {
  return {{"width", px(kWidth)},
          {"height", px(height)},
          {"left", px(kLeft)},
          {"right", px(kWidth - kRight)},
          {"top", px(kTop)},
          {"bottom", px(height - kBottom)},
          {"middle_x", px((kLeft + kWidth - kRight) / 2)},
          {"middle_y", px((kTop + height - kBottom) / 2)},
          {"x_title_y", px(height - 8)},
          {"tick_y", px(height - kBottom + 16)},
          {"tick_x", px(kLeft - 6)}};
}

/// Lines, and points with whiskers.
Json plane(const Chart& c) {
  constexpr double kHeight = 340;
  Range x, y;
  for (const Series& s : c.series)
    for (const Point& p : s.points) {
      x.add(p.x);
      y.add(p.y);
      if (p.high > p.low) {
        y.add(p.low);
        y.add(p.high);
      }
    }
  if (c.form == ChartForm::points) x.pad(0.08);
  y.pad(0.06);
  const Scale sx{x.low, x.high, kLeft, kWidth - kRight}, sy{y.low, y.high, kHeight - kBottom, kTop};
  Json out = frame(kHeight);
  out["x_ticks"] = tick_list(sx, ticks(x.low, x.high, kTicks));
  out["y_ticks"] = tick_list(sy, ticks(y.low, y.high, kTicks));
  Json lines = Json::array(), marks = Json::array(), legend = Json::array();
  std::set<std::string> keys;
  for (std::size_t i = 0; i < c.series.size(); ++i) {
    const Series& s = c.series[i];
    const int place = s.colour > 0 ? s.colour - 1 : static_cast<int>(i);
    const int colour = place % kColours + 1;
    const bool dashed = place / kColours % 2 == 1;
    if (const std::string key = s.key.empty() ? s.label : s.key; keys.insert(key).second)
      legend.push_back({{"label", key}, {"colour", colour}, {"dashed", dashed}});
    if (c.form == ChartForm::lines) {
      std::string path;
      for (const Point& p : s.points)
        path += fmt::format("{}{} {}", path.empty() ? 'M' : 'L', px(sx(p.x)), px(sy(p.y)));
      lines.push_back({{"path", path}, {"colour", colour}, {"dashed", dashed}, {"label", s.label}});
      continue;
    }
    for (const Point& p : s.points)
      marks.push_back({{"x", px(sx(p.x))},
                       {"y", px(sy(p.y))},
                       {"low", px(sy(p.low))},
                       {"high", px(sy(p.high))},
                       {"colour", colour},
                       {"label", fmt::format("{}: {:.1f} at {:.4g}", p.label, p.y, p.x)}});
  }
  out["lines"] = lines;
  out["marks"] = marks;
  out["legend"] = legend;
  return out;
}

/// One row a point, a group of rows a series.
Json ranges(const Chart& c) {
  constexpr double kRow = 20, kHead = 26, kLabels = 216;
  Range x;
  double height = kTop + kBottom;
  for (const Series& s : c.series) {
    height += kHead + kRow * static_cast<double>(s.points.size());
    for (const Point& p : s.points) {
      x.add(p.low);
      x.add(p.high);
    }
  }
  x.pad(0.04);
  const Scale sx{x.low, x.high, kLabels, kWidth - kRight};
  Json out = frame(height);
  out["left"] = px(kLabels);
  out["middle_x"] = px((kLabels + kWidth - kRight) / 2);
  out["x_ticks"] = tick_list(sx, ticks(x.low, x.high, kTicks));
  Json groups = Json::array();
  double at = kTop;
  for (const Series& s : c.series) {
    Json rows = Json::array();
    const double head = at + kHead - 8;
    at += kHead;
    for (std::size_t i = 0; i < s.points.size(); ++i, at += kRow) {
      const Point& p = s.points[i];
      constexpr std::size_t kLongest = 22;  // in the large letters of a narrow screen too
      rows.push_back(
          {{"y", px(at + kRow / 2)},
           {"text_y", px(at + kRow / 2 + 4)},
           {"label", shortened(p.label, kLongest)},
           {"x", px(sx(p.x))},
           {"low", px(sx(p.low))},
           {"high", px(sx(p.high))},
           {"colour", (p.colour > 0 ? p.colour - 1 : static_cast<int>(i)) % kColours + 1},
           {"title", fmt::format("{}: {:.1f} [{:.1f}, {:.1f}]", p.label, p.x, p.low, p.high)}});
    }
    groups.push_back({{"label", s.label}, {"y", px(head)}, {"rows", rows}});
  }
  out["label_x"] = px(kLabels - 10);
  out["groups"] = groups;
  return out;
}

Json heat(const Chart& c) {
  const auto& points = c.series.front().points;
  double columns = 1, rows = 1, most = 0;
  for (const Point& p : points) {
    columns = std::max(columns, p.x + 1);
    rows = std::max(rows, p.y + 1);
    most = std::max(most, p.low);
  }
  const double cell = std::min(20.0, (kWidth - kLeft - kRight) / columns), row = 12;
  const double height = kTop + rows * row + kBottom;
  Json out = frame(height);
  out["width"] = px(kLeft + columns * cell + kRight);
  out["right"] = px(kLeft + columns * cell);
  out["middle_x"] = px(kLeft + columns * cell / 2);
  Json cells = Json::array(), x_ticks = Json::array(), y_ticks = Json::array();
  for (const Point& p : points)
    cells.push_back(
        {{"x", px(kLeft + p.x * cell)},
         {"y", px(kTop + p.y * row)},
         {"width", px(cell)},
         {"height", px(row)},
         {"opacity", fmt::format("{:.3f}", most > 0 ? p.low / most : 0)},
         {"label", fmt::format("layer {:.0f}, expert {:.0f}: {:.1f} %", p.y, p.x, p.low)}});
  for (double e = 0; e < columns; ++e)
    x_ticks.push_back({{"at", px(kLeft + (e + 0.5) * cell)}, {"text", fmt::format("{:.0f}", e)}});
  for (double l = 0; l<rows; l += rows> 12 ? 5 : 1)
    y_ticks.push_back({{"at", px(kTop + (l + 0.5) * row)}, {"text", fmt::format("{:.0f}", l)}});
  out["cells"] = cells;
  out["x_ticks"] = x_ticks;
  out["y_ticks"] = y_ticks;
  return out;
}

}  // namespace

std::vector<double> ticks(double low, double high, int most) {
  if (!(high > low)) return {low};
  double step = std::pow(10, std::floor(std::log10((high - low) / most)));
  for (const double factor : {1.0, 2.0, 5.0, 10.0})
    if ((high - low) / (step * factor) <= most) {
      step *= factor;
      break;
    }
  std::vector<double> out;
  for (auto i = static_cast<std::int64_t>(std::ceil(low / step - 1e-9));
       static_cast<double>(i) * step <= high + 1e-9 * step; ++i)
    out.push_back(static_cast<double>(i) * step);
  return out;
}

nlohmann::json geometry(const Chart& chart) {
  Json out;
  switch (chart.form) {
    case ChartForm::lines:
    case ChartForm::points:
      out = plane(chart);
      break;
    case ChartForm::ranges:
      out = ranges(chart);
      break;
    case ChartForm::heat:
      out = heat(chart);
      break;
  }
  out["name"] = chart.name;
  out["title"] = chart.title;
  out["caption"] = chart.caption;
  out["x_label"] = chart.x_label;
  out["y_label"] = chart.y_label;
  return out;
}

}  // namespace mixlora
