#!/usr/bin/env bash
# What to run where there is a GPU: tests on the device, tuning, training, and the benchmarks beside dense, each part within 8
# minutes. Results are kept as they come, and the same command goes on with what is left.
#
#     benchmarks/gpu.sh [test|sanitize|tune|layers|models|train|all]
#
# Benchmarks are recorded in $OUT, or in benchmarks/results/; what tuning finds and the runs of train in $RUNS, or in build/gpu/.
# Without a GPU it says so and does a dry run: the tests that would run are collected, the cases are listed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

part="${1:-all}"
out="${OUT:-benchmarks/results}"
runs="${RUNS:-build/gpu}"
python="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
pytest=("$python" -m pytest -q -p no:cacheprovider)
gpu_tests=(tests/test_triton_block.py tests/test_triton_nm.py tests/test_triton_diagonal.py tests/test_triton_mlp.py
  tests/test_triton_passes.py tests/test_triton_graphs.py tests/test_autotune_triton.py)
# Small sizes alone, where masks matter: the sanitizer slows kernels down a hundredfold.
sanitized=(
  'tests/test_triton_block.py|TestForward and permutations and bfloat16 or TestEdges or TestInputsAhead and rows'
  'tests/test_triton_nm.py|nothing_is_read_past or padding_of_the_last_group or several_shares'
  'tests/test_triton_diagonal.py|nothing_is_read_past or wrap_around or several_shares'
  'tests/test_triton_mlp.py|edges_are_masked'
)

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

is_dry() {
  [ ${#dry[@]} -gt 0 ]
}

run_tests() {
  if is_dry; then
    "${pytest[@]}" --collect-only "${gpu_tests[@]}" | tail -n 1
    return
  fi
  timeout 480 "${pytest[@]}" -x "${gpu_tests[@]}" 2>&1 | tail -n 25
}

sanitize() {
  local sanitizer=() selection
  if is_dry; then
    echo 'compute-sanitizer is not run: these tests would be'
    sanitizer=("${pytest[@]}" --collect-only)
  elif ! command -v compute-sanitizer >/dev/null; then
    echo 'compute-sanitizer is not run: it comes with the CUDA toolkit, which is not here'
    return
  else
    sanitizer=(timeout 120 compute-sanitizer --tool memcheck --error-exitcode 1 "${pytest[@]}" -x)
  fi
  for selection in "${sanitized[@]}"; do
    echo "$selection"
    "${sanitizer[@]}" "${selection%%|*}" -k "${selection##*|}" 2>&1 | tail -n 25
  done
}

tune() {
  # Each shape is kept when it is measured: what time does not suffice for is measured by the next call.
  local model
  for model in timm:vit_base_patch16_224 hf:gpt2; do
    local command=("$python" -m padst_compile.cli tune "$model" --batch 64 --dtype bfloat16)
    if is_dry; then
      echo "${command[*]} --device cuda --effort full"
      continue
    fi
    timeout 200 "${command[@]}" --device cuda --effort full >/dev/null || echo "$model: time ends before all is tuned"
    timeout 40 "${command[@]}" --device cuda --effort cached --json "$runs/tuned-${model##*:}.json" --export "$runs/configs.json"
  done
}

layers() {
  timeout -k 20 480 "$python" benchmarks/kernels.py --device cuda --out "$out" --seconds 360 "${dry[@]}"
}

models() {
  timeout -k 20 480 "$python" benchmarks/end_to_end.py --device cuda --out "$out" --seconds 300 "${dry[@]}"
}

train() {
  # Any text will do: what counts is that updates, learned permutations and the compiled model work on the device.
  local permutation
  for permutation in autoshuffle sinkhorn_ste regroup; do
    local command=("$python" -m padst_compile.cli train hf:gpt2,n_layer=6,n_embd=384,n_head=6 README.md --compile
      --dtype bfloat16 --structure block:64 --permutation "$permutation" --steps 300 --interval 30
      --out "$runs/train-$permutation")
    if is_dry; then
      echo "${command[*]} --device cuda"
      continue
    fi
    timeout 160 "${command[@]}" --device cuda
  done
}

all() {
  local failed=() name
  for name in test sanitize tune layers models train; do
    echo "== $name"
    bash benchmarks/gpu.sh "$name" || failed+=("$name")
  done
  if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    return 1
  fi
}

is_dry || mkdir -p "$out" "$runs"
case "$part" in
  test) run_tests ;;
  sanitize | tune | layers | models | train | all) "$part" ;;
  *) echo "unknown part $part: test, sanitize, tune, layers, models, train or all" >&2; exit 2 ;;
esac
