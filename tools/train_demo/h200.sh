#!/bin/bash
# One command of the training on a GPU machine that may be taken away. From the repository's root:
#
#   bash tools/train_demo/h200.sh OUT SECONDS [STATE [ARGUMENT...]]
#
# OUT      a folder; gets train.log, loss.png, and in pieces of 15 MiB either state.tar.* (not done:
#          the next command's STATE) or models.tar.* (done: cat OUT/models.tar.* | tar -x)
# SECONDS  after which to stop, of the whole command, the start and compiling included
# STATE    a folder with the state.tar.* of an earlier command, to go on from there; or "": a machine
#          that is still the one of that command has it
# ARGUMENT for `train_demo train`, such as --steps 15000
set -euo pipefail
out=$1 seconds=$2 state=${3:-}
shift $(($# < 3 ? $# : 3))

# The root holds a folder `sched`, which must not shadow the standard library's; and the package is
# called quire, whatever the checkout is called.
work=/tmp/quire-train
mkdir -p "$work"
ln -sfn "$PWD" "$work/quire"
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}"

# Without a GPU fail at once, rather than train on the processor.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}
# For the next command, if the machine is still there by then.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/quire-train-programs}

mkdir -p "$out" "$work/state"
if [ -n "$state" ] && [ ! -e "$work/state/run.json" ]; then
  cat "$state"/state.tar.* | tar -C "$work" -x
fi

leave() {
  if [ -e "$work/models/demo-draft/README.md" ]; then  # which is written last
    tar -C "$work/models" -c demo demo-draft | split -d -b 15M - "$out/models.tar."
  elif [ -e "$work/state/run.json" ]; then
    tar -C "$work" -c state | split -d -b 15M - "$out/state.tar."
  fi
  cp "$work/loss.png" "$out/" 2>/dev/null || true
}
trap leave EXIT

python3 -P -m quire.tools.train_demo train --out "$work/models" --state "$work/state" --resume \
  --picture "$work/loss.png" --time-limit "$seconds" "$@" 2>&1 | tee "$out/train.log"
