// Trial: one fully resolved thing to do: train an adapter on tasks, then ask it suites.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "engine/specs.h"
#include "engine/specs_json.h"
#include "kernels/tensor.h"
#include "suites/protocol.h"

namespace mixlora {

struct EvaluateSpec : ProtocolSpec {
  std::vector<std::string> suites;
  std::int64_t limit = 0;         // first n rows of every suite; 0: all
  std::int64_t cutoff_len = 512;  // tokens of a prompt
};
template <class V> void fields(V& v, EvaluateSpec& s) {
  v("suites", s.suites);
  fields(v, static_cast<ProtocolSpec&>(s));
  v("limit", s.limit);
  v("cutoff_len", s.cutoff_len);
}

struct TrialSpec {
  std::string model;
  AdapterSpec adapter;
  TrainSpec train;
  EvaluateSpec evaluate;
};
template <class V> void fields(V& v, TrialSpec& s) {
  v("model", s.model);
  v("adapter", s.adapter);
  v("train", s.train);
  v("evaluate", s.evaluate);
}
void check(const TrialSpec& s, const std::string& path);

/// One trial of a sweep with its place in the axes.
struct Trial {
  TrialSpec spec;
  std::string label;                          // "MixLoRA / 2"
  std::map<std::string, std::string> labels;  // {"method": "MixLoRA", "seed": "2"}
  std::string key;                            // content hash, see trial_key
};

/// The spec without what cannot change a result: fields that the method or the routing strategy
/// does not read are their defaults, and so are the size of micro-batches and the way to the model.
/// Equal canonical specs are one trial.
TrialSpec canonical(TrialSpec spec);
/// Hash of everything that can change a result: the canonical spec, the model's and the data's
/// fingerprints, the type that frozen matrices are multiplied in.
std::string trial_key(const TrialSpec& spec, const std::string& model_hash,
                      const std::string& data_hash, DType matrix_type);
/// Fingerprint of a model source: config and sizes, times and heads of the weight files; the name
/// of a shape.
std::string model_fingerprint(const std::string& source);
/// Fingerprint of all splits a trial reads.
std::string data_fingerprint(const TrialSpec& spec);

}  // namespace mixlora
