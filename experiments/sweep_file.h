// SweepFile: a sweep as it is written: one field table gives reading, errors and the JSON schema.
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "experiments/trial.h"

namespace mixlora {

enum class DeviceChoice : std::uint8_t { automatic, cpu, cuda };

/// How many trials may train in one step over one base: "auto", "off", or at most so many.
struct Pack {
  std::int64_t most = 0;  // 0: auto
};

struct RunSpec {
  DeviceChoice device = DeviceChoice::automatic;
  Precision precision = Precision::automatic;
  std::optional<double> memory_limit_gib;
  Recompute recompute = Recompute::automatic;
  Pack pack;
  bool keep_adapters = true;
  double save_every_seconds = 60;  // of training; 0: never
  /// memory_limit_gib in bytes; 0: no limit is set.
  std::size_t memory_limit_bytes() const {
    constexpr double kGib = 1024.0 * 1024.0 * 1024.0;
    return static_cast<std::size_t>(memory_limit_gib.value_or(0) * kGib);
  }
};

/// Part of a trial's spec as an RFC 7396 merge patch: absent keys stay, null goes back to the
/// default. Checked against the fields of TrialSpec as it is read.
struct Patch {
  Json json = Json::object();
};
/// One value of an axis: {"label": ..., patch...}; with the axis's `path` a bare value, or
/// {"label": ..., "value": ...}.
struct AxisValue {
  Json json;
};
/// {axis: label or [labels]}: which trials are meant.
struct Selection {
  std::vector<std::pair<std::string, std::vector<std::string>>> axes;
};

struct Axis {
  std::string name;
  std::optional<std::string> path;  // JSON pointer to the one field that the values are for
  Selection when;                   // empty: every trial
  std::vector<AxisValue> values;
};

struct SweepFile {
  std::string schema;
  std::string name;
  std::string model;
  Patch base;
  std::vector<Axis> axes;
  std::vector<AxisValue> include;
  std::vector<Selection> exclude;
  RunSpec run;
  std::vector<std::string> tables;  // empty: all
};

inline auto enum_names(DeviceChoice /*of*/) {
  return std::array<std::pair<DeviceChoice, const char*>, 3>{{{DeviceChoice::automatic, "auto"},
                                                              {DeviceChoice::cpu, "cpu"},
                                                              {DeviceChoice::cuda, "cuda"}}};
}
inline auto enum_names(Precision /*of*/) {
  return std::array<std::pair<Precision, const char*>, 3>{
      {{Precision::automatic, "auto"}, {Precision::fp32, "fp32"}, {Precision::bf16, "bf16"}}};
}
void read_field(const Json& j, Pack& out, const std::string& path);
Json write_field(const Pack& in);
void read_field(const Json& j, Patch& out, const std::string& path);
Json write_field(const Patch& in);
void read_field(const Json& j, AxisValue& out, const std::string& path);
Json write_field(const AxisValue& in);
void read_field(const Json& j, Selection& out, const std::string& path);
Json write_field(const Selection& in);

template <class V> void fields(V& v, RunSpec& s) {
  v("device", s.device);
  v("precision", s.precision);
  v("memory_limit_gib", s.memory_limit_gib);
  v("recompute", s.recompute);
  v("pack", s.pack);
  v("keep_adapters", s.keep_adapters);
  v("save_every_seconds", s.save_every_seconds);
}
template <class V> void fields(V& v, Axis& s) {
  v("name", s.name);
  v("path", s.path);
  v("when", s.when);
  v("values", s.values);
}
template <class V> void fields(V& v, SweepFile& s) {
  v("$schema", s.schema);
  v("name", s.name);
  v("model", s.model);
  v("base", s.base);
  v("axes", s.axes);
  v("include", s.include);
  v("exclude", s.exclude);
  v("run", s.run);
  v("tables", s.tables);
}

/// Checks a partial trial spec: every key known, every value of its type. Throws InputError with
/// the path in the file.
void check_patch(const Json& patch, const std::string& path);
/// `patch` without nulls, "a;b;c" of tasks and suites as lists: what a TrialSpec is read from.
Json resolved(const Json& patch);
/// The patch that sets the field at JSON pointer `pointer` ("/train/seed") to `value`; throws
/// InputError when there is no such field.
Json patch_at(const std::string& pointer, const Json& value, const std::string& path);
/// A label as text: strings as they are, other values as JSON.
std::string label_text(const Json& value);
/// Tables a sweep may ask for.
const std::vector<std::string>& table_names();

}  // namespace mixlora
