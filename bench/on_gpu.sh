#!/usr/bin/env bash
# Measures on a GPU what has not been measured yet, in the order of its worth: bench/on_gpu.sh [--toy] [OUT [BASE]]
#
# A GPU is often lent for minutes. So every part is stopped when its time is over, and those after it still run; stop the
# whole at any time and keep what is done. OUT (default: on_gpu) gets a log and JSON of every part, and in parts.jsonl a
# line for each with its seconds and how it ended (124: its time was over). BASE (default: /dev/shm/base) gets 34 GB of
# random weights of FLUX.1-dev's size and 18 of the captioning model's, and keeps them for the next run.
# --toy runs the same parts small on the CPU with the toy base: to see that they run.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
toy=()
if [[ ${1:-} == --toy ]]; then
  toy=(--toy)
  shift
fi
out=${1:-on_gpu}
base=${2:-/dev/shm/base}
mkdir -p "$out"
out=$(cd "$out" && pwd -P)
bench=$root/script/bench

# part NAME SECONDS COMMAND …
part() {
  local name=$1 limit=$2 started=$SECONDS ended=0
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || ended=$?
  tail -n 3 "$out/$name.log"
  printf '{"part": "%s", "seconds": %d, "limit": %d, "ended": %d}\n' "$name" $((SECONDS - started)) "$limit" "$ended" \
    | tee -a "$out/parts.jsonl"
}

weights() {
  part weights 150 "$root/script/python" - "$base" << 'PYTHON'
import sys
from pathlib import Path

import torch

from bench import captioner, job
from tests import tiny_qwen

folder, device = Path(sys.argv[1]), torch.device("cuda")
if not (folder / "written").exists():
    job.write_base(folder, job.FULL, device, torch.bfloat16)
    (folder / "written").touch()
if not (folder / "captioner" / "preprocessor_config.json").is_file():
    tiny_qwen.build(folder / "captioner", size=captioner.SIZE_8B, device="cuda", dtype=torch.bfloat16)
PYTHON
}

if [[ ${#toy[@]} -gt 0 ]]; then
  part job 150 "$bench" job --toy --steps 5 --json "$out/job.json"
  part job-2 150 "$bench" job --toy --gpus 2 --steps 5 --json "$out/job-2.json"
  part step 120 "$bench" step --toy --rounds 1 --laps 2 --only no-prior --json "$out/step.json"
  part recordings 60 "$bench" recordings --toy --json "$out/recordings.json"
  part kernels 60 "$bench" kernels --toy --steps 1 --rows 5
  part captioner 120 "$bench" captioner --count 2 --tokens 4 --json "$out/captioner.json"
  part generate 120 "$bench" generate --toy --calls 1 --turns 2 --json "$out/generate.json"
else
  weights
  # Of random weights no caption passes the rules: every picture is asked about twice, which is the most that it takes.
  CAPTIONER=$base/captioner part job 180 \
    "$bench" job --folder "$base" --gpus 1 --steps 200 -i captioning=automatic --json "$out/job.json"
  # As many pictures seen on each number of GPUs, without captioning, which is the first one's alone.
  gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true)
  if [[ $gpus -gt 1 ]]; then
    for count in $(printf '%s\n' "$gpus" 2 1 | uniq); do
      part "job-$count" 180 "$bench" job --folder "$base" --gpus "$count" --steps 200 --json "$out/job-$count.json"
    done
    part two-gpus 120 "$root/script/test" "$root/tests/training/test_two_gpus.py"
  fi
  part step 180 "$bench" step --text-tokens 256 --only "512,768,1024;1024;768;512;no-prior" --rounds 1 --laps 4 \
    --json "$out/step-256.json"
  part recordings 120 "$bench" recordings --json "$out/recordings.json"
  part kernels-1024 60 "$bench" kernels
  part kernels-512 60 "$bench" kernels --sides 512
  part captioner 150 "$bench" captioner --folder "$base/captioner" --json "$out/captioner.json"
  part generate 150 "$bench" generate --folder "$base" --calls 2 --turns 2 --json "$out/generate.json"
  part step-512 120 "$bench" step --only "512,768,1024;no-prior;ours" --rounds 1 --laps 4 --json "$out/step-512.json"
fi
part tests 120 "$root/script/test" "$root/tests/training/test_graphs.py" "$root/tests/flux/test_attention.py" \
  "$root/tests/flux/test_rotary.py"
# These start processes on the CPU, which they refuse where a GPU is seen.
CUDA_VISIBLE_DEVICES= part ranks 150 "$root/script/test" "$root/tests/training/test_ranks.py"
