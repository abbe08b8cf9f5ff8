#!/usr/bin/env bash
# First figures on one accelerator, for docs/performance.md: about eight minutes on an H200.
#
#   OUT=/tmp/figures tools/bench/h200_session.sh [name ...]     names: see the end; default is all
#
# Each measurement has a time limit of its own and leaves NAME.json, NAME.log and NAME.png in $OUT;
# one that fails or runs out of time leaves its log and lets the others run. The python to use is
# $PY; the checkout must be importable as `quire` (PYTHONPATH, or installed).
set -u
PY=${PY:-python3}
OUT=${OUT:?a folder for the results}
CACHE=${CACHE:-/tmp/quire-bench-cache} # shared, so that each model's programs compile once
export PYTHONSAFEPATH=1 COLUMNS=140
mkdir -p "$OUT"

# measure NAME SECONDS ARGS...: `quire bench ARGS`, limited.
measure() {
    local name=$1 limit=$2 begin=$SECONDS status
    shift 2
    timeout --kill-after=10 "$limit" "$PY" -P -m quire.tools.cli bench "$@" --json \
        $("$PY" -c 'import matplotlib' 2>/dev/null && echo --plot "$OUT/$name.png") \
        >"$OUT/$name.json" 2>"$OUT/$name.log"
    status=$?
    echo "== $name: status $status, $((SECONDS - begin)) s of at most $limit"
    tail -n 30 "$OUT/$name.log"
}

QWEN="--model qwen2.5-1.5b --dummy-weights --cache-dir $CACHE"
LLAMA="--model llama-3.1-8b --dummy-weights --cache-dir $CACHE"

# The order is by worth: what is last is what a short lease loses.
kernels() { measure kernels 110 kernels --grid full --seconds 85; }
qwen_throughput() { measure qwen_throughput 110 throughput $QWEN --repeat 2; }
qwen_latency() { measure qwen_latency 60 latency $QWEN --batch 1,8,64,256 --repeat 2; }
llama_throughput() { measure llama_throughput 150 throughput $LLAMA --repeat 2; }
llama_latency() { measure llama_latency 90 latency $LLAMA --batch 1,8,64,256 --repeat 2; }
qwen_6gib() { measure qwen_6gib 80 throughput $QWEN --repeat 1 --memory 6GiB; }
qwen_startup() { measure qwen_startup 150 startup --model qwen2.5-1.5b --dummy-weights --runs 1; }
llama_startup() { measure llama_startup 180 startup --model llama-3.1-8b --dummy-weights --runs 1; }
scheduler() { measure scheduler 40 scheduler; }

if [ $# = 0 ]; then
    set -- kernels qwen_throughput qwen_latency llama_throughput llama_latency qwen_6gib scheduler \
        qwen_startup
fi
for name in "$@"; do "$name"; done
