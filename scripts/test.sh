#!/usr/bin/env bash
# Sets up, builds and runs everything that must hold: checks of the sources, sanitizers, all tests.
# ctest's summary is last.
# Reads suite data from MIXLORA_DATA and the model from MIXLORA_MODEL where they are set; what needs an absent one skips
# with a printed reason. MIXLORA_ASAN=0 leaves the sanitizers out.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
bash scripts/check.sh --quick
if [ -z "${MIXLORA_MODEL:-}" ]; then
  bash scripts/fetch_model.sh >/dev/null || echo "test: the model is not to be had; the tests that need it skip" >&2
fi
jobs=$(nproc)
if [ "${MIXLORA_ASAN:-1}" != 0 ]; then
  cmake --preset asan >/dev/null
  cmake --build --preset asan -j "$jobs"
  # What is slow by nature (learning, the real model) runs in the release build alone.
  ctest --preset asan -j "$jobs" --exclude-regex 'learns to reverse|SmolLM2' --output-on-failure
fi
cmake --preset cpu >/dev/null
cmake --build --preset cpu -j "$jobs"
ctest --preset cpu -j "$jobs"
