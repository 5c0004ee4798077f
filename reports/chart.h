// Chart: points, lines or a heat map with axes, and its geometry as JSON for the SVG template.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace mixlora {

struct Point {
  double x = 0, y = 0;
  double low = 0, high = 0;  // an interval; equal: none
  std::string label;
  int colour = 0;  // 1 ...: of a method, the same in every chart; 0: by position
};
struct Series {
  std::string label;
  std::vector<Point> points;
  int colour = 0;
  std::string key = {};  // in the legend, once for all series that share it; empty: the label
};

enum class ChartForm : std::uint8_t { lines, points, ranges, heat };

struct Chart {
  std::string name, title, caption;
  std::string x_label, y_label;
  ChartForm form = ChartForm::lines;
  std::vector<Series> series = {};  // heat: one series, y the row, x the column, low the value;
                                    // ranges: x the value, low and high its interval, label the row
};

/// Round numbers that span [low, high]: at most `most` steps of 1, 2 or 5 times a power of ten.
std::vector<double> ticks(double low, double high, int most);
/// Everything the template draws, in pixels of the view box: frame, ticks, paths, marks, legend.
nlohmann::json geometry(const Chart& chart);

}  // namespace mixlora
