#!/usr/bin/env bash
# Holds the program against its own baseline: runs experiments/sweeps/quickstart.json anew on the CPU (bf16 where the processor
# has it, else fp32; both round otherwise elsewhere, so answers are tested, not compared bit by bit) and checks accuracy, memory
# and that no trial is missing.
# usage: scripts/gate.sh [--update]     --update writes the baseline; read its diff like code
# Time is left out, since machines that run this are shared; on quiet cores of the baseline's processor
# MIXLORA_GATE_LATENCY=1.25 fails what takes 1.25 times as long.
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
if [ ! -x build/cpu/mixlora-bench ]; then
  echo "gate: build/cpu/mixlora-bench is not there; scripts/test.sh builds it" >&2
  exit 2
fi
program=build/cpu/mixlora-bench sweep=experiments/sweeps/quickstart.json baseline=reports/gate/quickstart-baseline.json
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$program" run "$sweep" --db "$work/gate.db" --out "$work/tables" >/dev/null
if [ "${1:-}" = --update ]; then
  "$program" check --baseline "$baseline" --update "$work/gate.db"
else
  "$program" check --baseline "$baseline" "$work/gate.db" --latency-ratio "${MIXLORA_GATE_LATENCY:-0}" --verbose
fi
