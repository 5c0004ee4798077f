#!/usr/bin/env bash
# From a machine with git and a shell to a comparison table: sets up, builds, fetches the model, runs the quickstart sweep
# (base, LoRA, DoRA, MixLoRA, MixDoRA on the starter suites) and prints its tables. Run it again: what is done is kept.
# usage: scripts/quickstart.sh [SWEEP.json]     another sweep than experiments/sweeps/quickstart.json
# Builds for the GPU where nvcc and a device are, else for the CPU; MIXLORA_PRESET=cpu|cuda decides otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
sweep=${1:-experiments/sweeps/quickstart.json}
[ -f "$sweep" ] || { echo "quickstart: $sweep is not there; usage: scripts/quickstart.sh [SWEEP.json]" >&2; exit 2; }
start=$SECONDS
stage() { printf '\n== %s (%d:%02d)\n' "$1" $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60)); }

stage "1/4 packages"
bash scripts/setup.sh

stage "2/4 build"
preset=${MIXLORA_PRESET:-cpu}
if [ -z "${MIXLORA_PRESET:-}" ] && command -v "${CUDACXX:-nvcc}" >/dev/null && nvidia-smi -L >/dev/null 2>&1; then preset=cuda; fi
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset" -j "$(nproc)" --target mixlora-bench | tail -n 1

stage "3/4 model"
bash scripts/fetch_model.sh

stage "4/4 $sweep"
"build/$preset/mixlora-bench" run "$sweep"
stage "done"
