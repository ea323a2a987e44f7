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
tests=0
for pid in "${pids[@]}"; do
    wait "$pid" || tests=$?
done
tail -n 1 "$out"/tests-*.txt
timeout 330 "$python" benchmarks/gpu_bench.py --out "$out" --minutes "${MINUTES:-5}" 2>&1 | tee "$out/gpu_bench.txt"
bench=${PIPESTATUS[0]}
echo "tests: exit $tests, benchmark: exit $bench; results in $out"
exit $((tests || bench))
