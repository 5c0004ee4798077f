#!/usr/bin/env bash
# Reads the sources: includes point left, the format is clang-format's, nothing warns, clang-tidy is silent.
# usage: scripts/check.sh [--quick | --all]
#   --quick   includes and format only
#   (none)    also a build with -Werror and clang-tidy over the sources changed since origin/main or main
#   --all     clang-tidy over every source
# clang-tidy stops after MIXLORA_TIDY_SECONDS (600) and says what it did not read. Exit: 0 clean, 1 not.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-changed}
case $mode in
  --quick | --all | changed) ;;
  *) echo "check: unknown argument \"$mode\"; usage: scripts/check.sh [--quick | --all]" >&2; exit 2 ;;
esac
folders=(kernels engine suites experiments reports)
bad=0

bash scripts/check_includes.sh || bad=1

# The release decides the layout, so another one than the project's would only find itself.
if clang-format --version 2>/dev/null | grep -q 'version 14\.'; then
  mapfile -t sources < <(git ls-files -- '*.h' '*.cpp' '*.cu' '*.cuh')
  clang-format --dry-run --Werror "${sources[@]}" || bad=1
else
  echo "check: clang-format 14 is not here; the format was not read"
fi
[ "$mode" = --quick ] && exit $bad

cmake -S . -B build/werror -G Ninja -DCMAKE_BUILD_TYPE=Release -DMIXLORA_CUDA=OFF -DCMAKE_CXX_FLAGS=-Werror >/dev/null
cmake --build build/werror || bad=1

if ! command -v clang-tidy >/dev/null; then
  echo "check: clang-tidy is not here (scripts/setup.sh --check installs it); it did not read"
  exit $bad
fi
if [ "$mode" = --all ]; then
  mapfile -t units < <(git ls-files -- "${folders[@]/%//*.cpp}")
else
  base=$(git merge-base HEAD origin/main 2>/dev/null || git merge-base HEAD main)
  mapfile -t units < <(git diff --name-only --diff-filter=d "$base" -- "${folders[@]/%//*.cpp}")
fi
deadline=$((SECONDS + ${MIXLORA_TIDY_SECONDS:-600}))
for i in "${!units[@]}"; do
  if [ $SECONDS -ge $deadline ]; then
    echo "check: time is over; clang-tidy did not read: ${units[*]:i}"
    break
  fi
  clang-tidy --quiet -p build/werror "${units[i]}" 2>/dev/null || bad=1
done
exit $bad
