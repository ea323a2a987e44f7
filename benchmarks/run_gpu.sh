#!/usr/bin/env bash
# Test and measure the GPU backend in one go, in under nine minutes: benchmarks/run_gpu.sh [folder for results]
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-results}}
python=${PYTHON:-python}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "run_gpu.sh needs a CUDA GPU and there is none here. Without one: $python benchmarks/compile_report.py --quick" >&2
    exit 2
fi
mkdir -p "$out"
# Compiling takes most of the tests' time, one core each: parts run side by side.
parts=${PARTS:-$(($(nproc) < 12 ? $(nproc) : 12))}
pids=()
for part in $(seq "$parts"); do
    timeout 200 "$python" -m pytest -q -m gpu --shard "$part/$parts" tests >"$out/tests-$part.txt" 2>&1 &
    pids+=($!)
done
# Every access of the kernels that pack, append and attend, beside the tests; each tensor in an allocation of its own.
if command -v compute-sanitizer >/dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 200 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -m gpu \
        tests/test_triton.py -k "default_cache or without_window or ragged or append_chooses_wide" >"$out/sanitizer.txt" 2>&1 &
    pids+=($!)
else
    echo "not run: compute-sanitizer of the CUDA toolkit is not installed" >"$out/sanitizer.txt"
fi
tests=0
for pid in "${pids[@]}"; do
    wait "$pid" || tests=$?
done
tail -n 1 "$out"/tests-*.txt "$out/sanitizer.txt"
timeout 330 "$python" benchmarks/gpu_bench.py --out "$out" --minutes "${MINUTES:-5}" 2>&1 | tee "$out/gpu_bench.txt"
bench=${PIPESTATUS[0]}
echo "tests: exit $tests, benchmark: exit $bench; results in $out"
exit $((tests || bench))
