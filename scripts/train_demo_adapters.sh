#!/usr/bin/env bash
# Trains patch adapters for the embedded demo model: 29 minutes on two idle, slow virtual cores (0.78 s a
# step). `--steps 1300` takes about 19 and gains a tenth less. A run that was cut off continues where it
# was; more arguments go to ddit-rt train.
#
#   scripts/train_demo_adapters.sh [OUT] [ARGUMENTS ...]      default OUT: demo_out/adapters
#
# The images are drawn with seeds that the model was not trained on, and every state gets noise of its
# own, so that nothing can be learnt by heart. Held-out captions (one in sixteen) are not drawn; the gain
# in OUT/README.md is measured on those.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="${1:-$root/demo_out/adapters}"
if (($#)); then shift; fi
VENV="$root/.venv" "$root/scripts/setup.sh" test
mkdir -p "$out/run"
"$root/.venv/bin/python" - "$out/run" "$root/scripts" <<'PYTHON'
import pathlib
import sys

from PIL import Image

from ddit_rt.lab.demo.prompts import held_out_prompts

sys.path.append(sys.argv[2])
from demo_training.draw_images import ImageConfig, draw_series

COUNT, SEED = 2048, 1000
folder = pathlib.Path(sys.argv[1])
(folder / "held_out.txt").write_text("\n".join(held_out_prompts(24)) + "\n")
images = folder / "images"
if not images.exists():
    partial = folder / "images.partial"
    partial.mkdir(exist_ok=True)
    for index in range(COUNT):
        (pixels,), (attributes,) = draw_series(ImageConfig(), SEED, index, 1)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(partial / f"{index:05d}.png")
        (partial / f"{index:05d}.txt").write_text(attributes.caption + "\n")
    partial.rename(images)
PYTHON
"$root/.venv/bin/ddit-rt" train demo --data "$out/run/images" --out "$out" \
  --gain-prompts "$out/run/held_out.txt" --encode-batch 16 --batch-size 16 --steps 2000 --lr 3e-3 \
  --weighting clean --warmup-steps 50 --ema 0.995 --save-dtype float16 --sample-every 0 \
  --checkpoint-every 200 "$@"
