#!/usr/bin/env bash
# Checks and times the CUDA backend on this machine's GPU and writes one report.
# usage: scripts/gpu.sh [--out DIRECTORY] [STAGE ...]     all stages when none is named
#   parity    every op case against the double reference in f32 and bf16, training against the CPU
#   sanitize  the op cases under compute-sanitizer: memcheck, racecheck, initcheck
#   bench     training steps and scoring at Llama-2-7B's shape, beside each method's products alone
#   ops       the op cases in bf16: time, rates, share of the roofline
#   peft      PEFT on the same device, beside bench's figures in the same folder (needs torch, transformers, peft)
#   compiled  PEFT in bf16 under torch.compile, its fastest: minutes of compiling
#   load      13.5 GB of Llama-2-7B's shape written in shards, read to the device from the page cache (disk for them; numpy)
#   real      as bench, on batches of 16 real questions of ARC-easy and PIQA
#   budget    the same batches within 23 GiB: every method, and two MixLoRA adapters in one step
#   profile   where the steps' time goes, by op family and layer
#   smollm2   SmolLM2-135M: training against the CPU, the sweep that the CPU runs, step benchmarks
# Builds with the cuda preset, for this GPU alone, unless MIXLORA_BUILD names a build that is there. real, budget and
# smollm2 read suites from MIXLORA_DATA and the model (real, budget: its tokenizer alone) from MIXLORA_MODEL, else
# models/smollm2-135m; what is missing there is made by scripts/fetch_model.sh, of MIXLORA_MODEL_FILES when that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
out=build/gpu-report
if [ "${1:-}" = --out ]; then
  [ $# -ge 2 ] || { echo "gpu: --out wants a directory" >&2; exit 2; }
  out=$2
  shift 2
fi
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(parity sanitize ops bench load peft compiled real budget profile smollm2)
for stage in "${stages[@]}"; do
  case $stage in
    parity | sanitize | ops | bench | load | peft | compiled | profile) ;;
    real | budget | smollm2)
      [ -n "${MIXLORA_DATA:-}" ] || { echo "gpu: stage $stage reads real questions: set MIXLORA_DATA to the suites' folder" >&2; exit 2; }
      ;;
    *) echo "gpu: no stage \"$stage\"; expected parity, sanitize, ops, bench, load, peft, compiled, real, budget, profile or smollm2" >&2; exit 2 ;;
  esac
done
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
  # A filter that names no test any more exits with 0.
  { "$@" >"$out/last.txt" 2>&1 && ! grep -q '^No tests ran' "$out/last.txt"; } || { bad=1; echo "FAILED ($title)" | tee -a "$report"; }
  { echo '```'; cat "$out/last.txt"; echo '```'; } >>"$report"
  echo "gpu: $title: done"
}
model=${MIXLORA_MODEL:-models/smollm2-135m}
need_model() { # FILE: what must be in the model's folder
  [ -f "$model/$1" ] && return
  # shellcheck disable=SC2086  # several files, divided by spaces
  bash scripts/fetch_model.sh "$model" ${MIXLORA_MODEL_FILES:-} || exit 1
}
peers() { # title, argument of bench_peft.py...
  section "$1" python3 scripts/bench_peft.py "${@:2}"
  cat "$out/last.txt" >>"$out/peft.txt"
}
# cuBLASLt's own kernels (nvjet) and attention by warpgroups synchronise by mbarriers, which racecheck does not follow.
races() {
  compute-sanitizer --tool racecheck "$kernels" "CUDA*" -c "in bf16" | tee "$out/races.txt"
  ! grep 'Race reported between' "$out/races.txt" | grep -Eqv 'nvjet|warpgroup_'
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
    ops)
      section "Op cases against the roofline" "$(find_program op_bench)" --benchmark_filter='^cuda bf16/' --benchmark_min_time=0.01
      ;;
    bench)
      for shape in 8x512 16x128; do
        section "Steps of $shape" "$program" bench --model shape:llama-2-7b --shape "$shape" --steps 12 --rows 64 \
          --score-tokens 8192 --device cuda --format markdown --out "$out/bench-$shape"
      done
      section "Steps of 8x512, layers recomputed" "$program" bench --model shape:llama-2-7b --shape 8x512 --steps 6 \
        --rows 1 --score-tokens 8192 --device cuda --recompute layer --methods lora,mixlora --format markdown
      ;;
    load)
      rm -rf "$out/llama-2-7b"
      section "Llama-2-7B's shape in files" python3 scripts/make_shape_model.py "$out/llama-2-7b"
      cat "$out"/llama-2-7b/*.safetensors >/dev/null # into the page cache
      section "Loaded from the page cache" "$program" bench --model "$out/llama-2-7b" --shape 1x512 --steps 2 --rows 0 \
        --methods lora --device cuda --format markdown
      rm -rf "$out/llama-2-7b"
      ;;
    peft)
      rm -f "$out/peft.txt"
      peers "PEFT as shipped" --methods lora --modes shipped
      peers "PEFT with checkpointing" --methods dora --modes checkpointed
      peers "transformers, forward only" --score --shapes 16x512
      section "Beside the peers" python3 scripts/peers.py "$out"
      ;;
    compiled)
      peers "PEFT in bf16, compiled" --methods lora,dora --modes compiled --shapes 8x512
      section "Beside the peers" python3 scripts/peers.py "$out"
      ;;
    real)
      need_model tokenizer.json
      for task in arc-e piqa; do
        section "16 questions of $task" "$program" bench --model shape:llama-2-7b --tokenizer "$model" --task "$task" --steps 20 \
          --rows 256 --score-tokens 8192 --device cuda --format markdown
      done
      ;;
    budget)
      need_model tokenizer.json
      for task in arc-e piqa; do
        section "16 questions of $task within 23 GiB" "$program" bench --model shape:llama-2-7b --tokenizer "$model" --task "$task" \
          --steps 6 --rows 0 --memory-limit 23 --recompute auto --methods lora,dora,mixlora,mixdora,mixlora+mixlora --device cuda \
          --format markdown
      done
      section "One and two adapters at one recompute level" "$program" bench --model shape:llama-2-7b --tokenizer "$model" \
        --task arc-e --steps 6 --rows 0 --memory-limit 23 --recompute layer --methods mixlora,mixlora+mixlora --device cuda \
        --format markdown
      ;;
    profile)
      for method in lora mixlora mixdora; do
        section "Profile of 8x512, $method" "$program" profile --model shape:llama-2-7b --shape 8x512 --method "$method" \
          --steps 4 --device cuda --out "$out/profile-8x512-$method" --format markdown
      done
      if [ -f "$model/model.safetensors" ] && [ -n "${MIXLORA_DATA:-}" ]; then
        for method in lora mixlora; do
          section "Profile of 16 questions, SmolLM2-135M, $method" "$program" profile --model "$model" --task arc-e \
            --method "$method" --warmup 4 --steps 8 --device cuda --out "$out/profile-smollm2-$method" --format markdown
        done
      fi
      ;;
    smollm2)
      need_model model.safetensors
      [ -e models/smollm2-135m ] || { mkdir -p models && ln -s "$(realpath "$model")" models/smollm2-135m; }
      section "SmolLM2-135M against the CPU" env MIXLORA_MODEL="$model" "$engine" "SmolLM2-135M trains on CUDA*"
      rm -f "$out/arc-easy-smollm2.db"
      section "SmolLM2-135M, ARC-easy sweep" "$program" run experiments/sweeps/arc-easy-smollm2.json \
        --db "$out/arc-easy-smollm2.db" --out "$out/arc-easy-smollm2"
      section "SmolLM2-135M, 16 questions of arc-e" "$program" bench --model "$model" --task arc-e --steps 40 --rows 512 \
        --score-tokens 16384 --device cuda --format markdown
      ;;
  esac
done
rm -f "$out/last.txt" "$out/races.txt"
echo "gpu: report in $report"
exit $bad
