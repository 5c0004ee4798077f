// Prediction: how long a plan takes, from rates measured before on this device, else from a
// measured step of a shallow model of the same shape.
#pragma once
#include <map>
#include <optional>
#include <string>

#include "experiments/plan.h"

namespace mixlora {

/// Tokens a second by method name.
struct Rates {
  std::map<std::string, double> train, score;
  std::string source;  // where they are from, for people
};

/// Medians over the finished trials of the same model on the same device in a store; no method in
/// it that was not measured.
Rates measured_rates(Database& db, const std::string& model_hash, const std::string& device);

/// Adds what `rates` lacks for the trials that run: one method at a time, training steps and
/// scoring of models with one layer and a few of this shape and random weights, which give the time
/// of all layers.
void calibrate(Rates& rates, const Sweep& sweep, const Plan& plan, const ModelConfig& model,
               Backend& ops, Texts& texts);

/// Seconds of one trial (its share of a pack), or none without a rate.
std::optional<double> predicted_seconds(const Rates& rates, const TrialSpec& spec,
                                        const TrialPlan& plan);

}  // namespace mixlora
