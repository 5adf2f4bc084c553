#!/usr/bin/env bash
# What to run where there is a GPU: tests on the device, tuning, and the benchmarks beside dense, each within 8 minutes.
#
#     benchmarks/gpu.sh [test|sanitize|tune|layers|models|train|all]     results go to $OUT, or to benchmarks/results/
#
# Without a GPU it says so and does a dry run: the tests that would run are collected, the cases are listed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

part="${1:-all}"
out="${OUT:-benchmarks/results}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
gpu_tests=(tests/test_triton_block.py tests/test_triton_nm.py tests/test_triton_diagonal.py tests/test_triton_mlp.py
  tests/test_triton_passes.py tests/test_autotune_triton.py)

has_gpu() {
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
}

if has_gpu; then
  dry=()
  "$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
else
  dry=(--dry-run)
  echo 'no GPU here: a dry run, nothing is measured'
fi

run_tests() {
  if [ ${#dry[@]} -gt 0 ]; then
    "$python" -m pytest -q --collect-only "${gpu_tests[@]}" | tail -n 1
    return
  fi
  timeout 480 "$python" -m pytest -q -x -p no:cacheprovider "${gpu_tests[@]}" 2>&1 | tail -n 25
}

sanitize() {
  # Small sizes alone: the sanitizer slows kernels down a hundredfold.
  if [ ${#dry[@]} -gt 0 ] || ! command -v compute-sanitizer >/dev/null; then
    echo 'compute-sanitizer is not run: it needs a GPU and the CUDA toolkit'
    return
  fi
  timeout 480 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" -m pytest -q -x -p no:cacheprovider tests/test_triton_block.py -k 'odd or empty or ragged' 2>&1 | tail -n 25
}

tune() {
  if [ ${#dry[@]} -gt 0 ]; then
    "$python" -m padst_compile.cli tune --help | head -n 5
    return
  fi
  for model in timm:vit_base_patch16_224 hf:gpt2; do
    timeout 240 "$python" -m padst_compile.cli tune "$model" --device cuda --dtype bfloat16 --batch 64 --effort full \
      --json "$out/tuned-${model##*:}.json"
  done
}

layers() {
  timeout 480 "$python" benchmarks/kernels.py --device cuda --out "$out" "${dry[@]}"
}

models() {
  timeout 480 "$python" benchmarks/end_to_end.py --device cuda --out "$out" "${dry[@]}"
}

train() {
  # Any text will do: what counts is that updates, learned permutations and the compiled model work on the device.
  if [ ${#dry[@]} -gt 0 ]; then
    "$python" -m padst_compile.cli train --help | head -n 5
    return
  fi
  for permutation in autoshuffle sinkhorn_ste regroup; do
    timeout 160 "$python" -m padst_compile.cli train hf:gpt2,n_layer=6,n_embd=384,n_head=6 README.md --device cuda --compile \
      --dtype bfloat16 --structure block:64 --permutation "$permutation" --steps 300 --interval 30 --out "$out/train-$permutation"
  done
}

mkdir -p "$out"
case "$part" in
  test) run_tests ;;
  sanitize) sanitize ;;
  tune) tune ;;
  layers) layers ;;
  models) models ;;
  train) train ;;
  all) run_tests; sanitize; tune; layers; models; train ;;
  *) echo "unknown part $part: test, sanitize, tune, layers, models, train or all" >&2; exit 2 ;;
esac
