#!/usr/bin/env bash
# Includes point left along kernels <- engine <- suites <- experiments <- reports; the program (main*.cpp, commands/) may see all.
set -euo pipefail
cd "$(dirname "$0")/.."
order=(kernels engine suites experiments reports)
bad=0
for i in "${!order[@]}"; do
  for right in "${order[@]:i+1}"; do
    if grep -rnE "#include \"$right/" "${order[i]}" --include='*.h' --include='*.cpp' --include='*.cu' --include='*.cuh' |
      grep -vE '/main[a-z_]*\.cpp:|^experiments/commands/'; then
      bad=1
    fi
  done
done
[ $bad -eq 0 ] || echo "includes: the lines above point right; the order is ${order[*]}" >&2
exit $bad
