#!/usr/bin/env bash
# Holds the program against its own baseline: runs experiments/sweeps/gate.json anew (fp32 on the CPU, so its answers do not
# depend on the machine) and checks accuracy and memory. Time is left out: machines that run this are shared.
# usage: scripts/gate.sh [--update]     --update writes the baseline; read its diff like code
# Exit: 0 as good as the baseline, 1 a regression, 2 wrong input. Without the model it says so and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  "" | --update) ;;
  *) echo "gate: unknown argument \"$1\"; usage: scripts/gate.sh [--update]" >&2; exit 2 ;;
esac
if [ ! -f models/smollm2-135m/config.json ]; then
  echo "gate: skipped: models/smollm2-135m is not there; scripts/fetch_model.sh gets it"
  exit 0
fi
program=build/cpu/mixlora-bench sweep=experiments/sweeps/gate.json baseline=reports/gate/gate-baseline.json
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$program" run "$sweep" --db "$work/gate.db" --out "$work/tables" >/dev/null
if [ "${1:-}" = --update ]; then
  "$program" check --baseline "$baseline" --update "$work/gate.db"
else
  "$program" check --baseline "$baseline" "$work/gate.db" --latency-ratio 0 --verbose
fi
