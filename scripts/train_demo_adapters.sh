#!/usr/bin/env bash
# Trains patch adapters for the embedded demo model from its own trajectories: about 20 minutes on
# two idle cores. A run that was cut off continues where it was; more arguments go to ddit-rt train.
#
#   scripts/train_demo_adapters.sh [OUT] [ARGUMENTS ...]      default OUT: demo_out/adapters
#
# Held-out captions (one in sixteen) are not trained on; the gain in OUT/README.md is measured there.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$root/demo_out/adapters}"
if (($#)); then shift; fi
"$root/scripts/setup.sh" test
mkdir -p "$out/run"
"$root/.venv/bin/python" - "$out/run" <<'PYTHON'
import pathlib
import random
import sys

from ddit_rt.demo.pictures import all_attributes, is_held_out
from ddit_rt.demo.prompts import held_out_prompts

folder = pathlib.Path(sys.argv[1])
captions = [a.caption for a in all_attributes() if not is_held_out(a)]
random.Random(0).shuffle(captions)
(folder / "prompts.txt").write_text("\n".join(captions) + "\n")
(folder / "held_out.txt").write_text("\n".join(held_out_prompts(24)) + "\n")
PYTHON
"$root/.venv/bin/ddit-rt" train demo --self "$out/run/prompts.txt" --out "$out" \
  --gain-prompts "$out/run/held_out.txt" --limit 768 --encode-batch 16 \
  --batch-size 16 --steps 1200 --lr 5e-4 --weighting clean --warmup-steps 50 --ema 0.995 \
  --save-dtype float16 --sample-every 500 --checkpoint-every 250 "$@"
