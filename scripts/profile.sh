#!/usr/bin/env bash
# Shows chosen training steps to Nsight Systems or Nsight Compute.
# usage: scripts/profile.sh nsys|ncu [TOOL OPTION ... --] [ARGUMENT OF mixlora-bench profile ...]
#   scripts/profile.sh nsys sweep.json --trial MixLoRA --warmup 3 --steps 2
#   scripts/profile.sh ncu --nvtx-include mixlora@mixture/ --set full -- --model shape:llama-2-7b --shape 8x512 --method mixlora --steps 1
# The program opens the profiler's window before the first chosen step and closes it behind the last. Ranges of the NVTX
# domain mixlora: step, forward, loss, backward, recompute, optimizer, layer (its number is the payload), attention,
# feed_forward, dora_scales, and the op families. The report is OUT.nsys-rep or OUT.ncu-rep; OUT is MIXLORA_PROFILE, else
# build/profile. The program is found in MIXLORA_BUILD, else build/cuda.
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
tool=${1:-}
case $tool in
  nsys) comes="Nsight Systems (CUDA's package nsight-systems, or developer.nvidia.com/nsight-systems)" ;;
  ncu) comes="Nsight Compute (CUDA's package cuda-nsight-compute, or developer.nvidia.com/nsight-compute)" ;;
  *) usage ;;
esac
shift
options=() rest=("$@")
for i in "${!rest[@]}"; do
  if [ "${rest[i]}" = -- ]; then
    options=("${rest[@]:0:i}") rest=("${rest[@]:i+1}")
    break
  fi
done
[ ${#rest[@]} -gt 0 ] || usage
command -v "$tool" >/dev/null || { echo "profile: $tool is not on PATH; it comes with $comes" >&2; exit 2; }
program=${MIXLORA_BUILD:-build/cuda}/mixlora-bench
[ -x "$program" ] || { echo "profile: $program is not there; build it (cmake --preset cuda && cmake --build --preset cuda), or set MIXLORA_BUILD" >&2; exit 2; }
out=${MIXLORA_PROFILE:-build/profile}
mkdir -p "$(dirname "$out")"
if [ "$tool" = nsys ]; then
  nsys profile --trace=cuda,nvtx --sample=none --cpuctxsw=none --capture-range=cudaProfilerApi --capture-range-end=stop \
    --force-overwrite=true --output="$out" "${options[@]}" "$program" profile --window "${rest[@]}"
  echo "profile: $out.nsys-rep; by range: nsys stats --report nvtx_gpu_proj_sum $out.nsys-rep"
else
  ncu --profile-from-start off --nvtx --force-overwrite --export "$out" "${options[@]}" "$program" profile --window "${rest[@]}"
  echo "profile: $out.ncu-rep; by kernel: ncu --import $out.ncu-rep --print-summary per-kernel"
fi
