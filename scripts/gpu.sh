#!/usr/bin/env bash
# Checks and times the CUDA backend on this machine's GPU and writes one report.
# usage: scripts/gpu.sh [--out DIRECTORY] [STAGE ...]     stages: parity sanitize bench peft; all when none is named
#   parity    every op case against the double reference in f32 and bf16, training against the CPU
#   sanitize  the op cases under compute-sanitizer: memcheck, racecheck, initcheck
#   bench     training steps and scoring at Llama-2-7B's shape, beside each method's products alone
#   peft      PEFT on the same device (scripts/bench_peft.py; needs torch, transformers, peft)
# Builds with the cuda preset, for this GPU alone, unless MIXLORA_BUILD names a build that is there.
set -uo pipefail
cd "$(dirname "$0")/.."
out=build/gpu-report
if [ "${1:-}" = --out ]; then
  [ $# -ge 2 ] || { echo "gpu: --out wants a directory" >&2; exit 2; }
  out=$2
  shift 2
fi
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(parity sanitize bench peft)
command -v nvidia-smi >/dev/null || { echo "gpu: nvidia-smi is not here; this script needs an NVIDIA GPU" >&2; exit 1; }
build=${MIXLORA_BUILD:-}
if [ -z "$build" ]; then
  build=build/cuda
  cmake --preset cuda -DCMAKE_CUDA_ARCHITECTURES=native >/dev/null && cmake --build --preset cuda -j "$(nproc)" || exit 1
fi
find_program() { find "$build" -name "$1" -type f -perm -u+x | head -n 1; }
program=$(find_program mixlora-bench) kernels=$(find_program test_kernels) engine=$(find_program test_engine)
mkdir -p "$out"
report=$out/report.md
bad=0
section() { # title, command...
  local title=$1
  shift
  { printf '\n## %s\n\n    %s\n\n' "$title" "$*"; } >>"$report"
  "$@" >"$out/last.txt" 2>&1 || { bad=1; echo "FAILED ($title)" | tee -a "$report"; }
  { echo '```'; cat "$out/last.txt"; echo '```'; } >>"$report"
  echo "gpu: $title: done"
}
# cuBLASLt's own kernels (nvjet) synchronise by means that racecheck does not follow; it reports them alone.
races() {
  compute-sanitizer --tool racecheck "$kernels" "CUDA*" -c "in bf16" | tee "$out/races.txt"
  ! grep 'Race reported between' "$out/races.txt" | grep -qv nvjet
}
{
  echo "# CUDA report"
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv,noheader
} >"$report"
for stage in "${stages[@]}"; do
  case $stage in
    parity)
      section "Op cases" "$kernels" "[cuda]"
      section "Training" "$engine" "[cuda]"
      ;;
    sanitize)
      for tool in memcheck initcheck; do
        section "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$kernels" "CUDA*" -c "in bf16"
      done
      section "compute-sanitizer racecheck" races
      ;;
    bench)
      for shape in 8x512 16x128; do
        section "Steps of $shape" "$program" bench --model shape:llama-2-7b --shape "$shape" --steps 12 --rows 64 \
          --score-tokens 8192 --device cuda --format markdown
      done
      section "Steps of 8x512, layers recomputed" "$program" bench --model shape:llama-2-7b --shape 8x512 --steps 6 \
        --rows 1 --score-tokens 8192 --device cuda --recompute layer --methods lora,mixlora --format markdown
      ;;
    peft)
      section "PEFT as shipped" python3 scripts/bench_peft.py --methods lora --modes shipped
      section "PEFT with checkpointing" python3 scripts/bench_peft.py --methods dora --modes checkpointed
      section "PEFT in bf16, compiled" python3 scripts/bench_peft.py --methods lora --modes compiled --shapes 8x512
      section "transformers, forward only" python3 scripts/bench_peft.py --score --shapes 16x512
      ;;
    *) echo "gpu: unknown stage \"$stage\"; expected parity, sanitize, bench or peft" >&2; exit 2 ;;
  esac
done
rm -f "$out/last.txt" "$out/races.txt"
echo "gpu: report in $report"
exit $bad
