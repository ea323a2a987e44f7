#!/usr/bin/env bash
# Prove, tune and measure the GPU backend in one go, in nine minutes.
#
#   benchmarks/run_gpu.sh [--only PART]... [--minutes 9] [--dry-run] [folder for results]
#
# Parts, in this order, each within its share of the minutes; one that fails or runs out of time leaves what it has, and the
# next one starts:
#   tests       the kernels against plain torch; beside them compute-sanitizer, where that is installed
#   tune        the fastest stages, warps, tokens a step and splits of this GPU, for all that runs on it from then on
#   attention   packing, and attention of one layer beside SDPA, FlashAttention and FlashInfer
#   end-to-end  decoding of a whole model beside stock caches, StaticCache in a CUDA graph and under torch.compile among them
# --dry-run prints the commands and needs no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' benchmarks/run_gpu.sh
}

only=() minutes=9 dry="" out=""
while (($#)); do
    case $1 in
        --only) only+=("${2:?--only names tests, tune, attention or end-to-end}") && shift ;;
        --minutes) minutes=${2:?--minutes takes a number} && shift ;;
        --dry-run) dry=1 ;;
        -h | --help) usage && exit 0 ;;
        -*) echo "run_gpu.sh has no $1; see --help." >&2 && exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
for part in "${only[@]}"; do
    case $part in
        tests | tune | attention | end-to-end) ;;
        *) echo "--only must be tests, tune, attention or end-to-end; got '$part'." >&2 && exit 2 ;;
    esac
done
if ! [[ $minutes =~ ^[1-9][0-9]*$ ]]; then
    echo "--minutes must be a whole number, 1 or more; got '$minutes'." >&2
    exit 2
fi
out=${out:-${OUT:-results}}
python=${PYTHON:-python}
if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "run_gpu.sh needs a CUDA GPU and there is none here. Without one: $python benchmarks/compile_report.py --quick" >&2
    exit 2
fi
[ -n "$dry" ] || mkdir -p "$out"

# Seconds of nine minutes; the rest is for starting and ending.
declare -A share=([tests]=190 [tune]=105 [attention]=85 [end-to-end]=140)

wanted() {
    local part
    ((${#only[@]} == 0)) && return 0
    for part in "${only[@]}"; do
        [ "$part" = "$1" ] && return 0
    done
    return 1
}

# run_within SECONDS LOG COMMAND...: its output in a file of the results; it is stopped when its time is up.
run_within() {
    local seconds=$1 log=$2
    shift 2
    if [ -n "$dry" ]; then
        echo "timeout $seconds $* >$out/$log"
    else
        timeout --kill-after=5 "$seconds" "$@" >"$out/$log" 2>&1
    fi
}

tests() {
    local seconds=$1 part parts pid pids=() failed=0
    # Compiling takes most of the tests' time, one core each: parts run side by side.
    parts=${PARTS:-$(($(nproc) < 12 ? $(nproc) : 12))}
    for part in $(seq "$parts"); do
        run_within "$seconds" "tests-$part.txt" "$python" -m pytest -q -m gpu --shard "$part/$parts" tests &
        pids+=($!)
    done
    # Every access of the kernels that pack, append and attend, beside the tests; each tensor in an allocation of its own.
    if command -v compute-sanitizer >/dev/null; then
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_within "$seconds" sanitizer.txt compute-sanitizer --error-exitcode 9 \
            "$python" -m pytest -q -m gpu tests/test_triton.py \
            -k "default_cache or without_window or ragged or append_chooses_wide" &
        pids+=($!)
    elif [ -z "$dry" ]; then
        echo "not run: compute-sanitizer of the CUDA toolkit is not installed" >"$out/sanitizer.txt"
    fi
    for pid in "${pids[@]}"; do
        wait "$pid" || failed=$?
    done
    [ -n "$dry" ] || tail -n 1 "$out"/tests-*.txt "$out/sanitizer.txt"
    return "$failed"
}

# benchmark SECONDS LOG COMMAND...: a script that is told to begin nothing in its last 15 seconds.
benchmark() {
    local seconds=$1 log=$2 status
    shift 2
    run_within "$seconds" "$log" "$python" "$@" --out "$out" \
        --minutes "$(awk "BEGIN { print ($seconds > 20 ? $seconds - 15 : $seconds) / 60 }")"
    status=$?
    [ -n "$dry" ] || cat "$out/$log"
    return "$status"
}

tune() { benchmark "$1" tune.txt benchmarks/tune_gpu.py; }
attention() { benchmark "$1" attention.txt benchmarks/gpu_bench.py --only packing attention; }
end-to-end() { benchmark "$1" end-to-end.txt benchmarks/gpu_bench.py --only end-to-end; }

summary="" exit_status=0
for part in tests tune attention end-to-end; do
    wanted "$part" || continue
    echo "== $part"
    "$part" "$((share[$part] * minutes / 9))"
    status=$?
    ((status)) && exit_status=1
    summary+="$part: exit $status; "
done
echo "${summary}results in $out"
exit "$exit_status"
