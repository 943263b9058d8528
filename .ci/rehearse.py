"""Rehearses scripts/gpu_battery.sh on the CPU, in an environment like that of a lent GPU machine.

    python .ci/rehearse.py WHEEL SCRATCH

That machine has PyTorch and the packages named here with what they need, none of diffusers, PyAV
or prodigyopt, and torch's warnings come as they come. WHEEL is one of this checkout. Fails unless
every step of the battery ended well, also of a second call, which must find them done.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THERE = (
    *("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow", "tqdm"),
    *("matplotlib", "torchmetrics", "tensorboard", "pytest", "pytest-timeout", "hypothesis"),
    *("pybind11", "scikit-build-core", "cmake", "ninja", "pip", "setuptools", "requests"),
)
MISSING = {"diffusers", "ddit-rt", "av", "prodigyopt", "importlib-metadata", "zipp"}
MOST_FILES = 7


def main() -> int:
    """Entry point."""
    wheel, scratch = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    python = environment(scratch)
    settings = {
        "PYTHON": str(python),
        "WHEELS": str(scratch / "wheels"),
        "SCRATCH": str(scratch / "work"),
        "OUT": str(scratch / "out"),
        "DEVICE": "cpu",
        "PRESET": "tiny",
        "END": "3000",  # nothing here goes by time, on however slow a machine
    }
    battery(settings | {"PYTHON": sys.executable, "WHEEL": str(wheel)}, "pack")
    started = time.perf_counter()
    battery(settings)
    seconds = time.perf_counter() - started
    check(scratch / "out")
    again = time.perf_counter()
    battery(settings | {"OUT": str(scratch / "again")})
    check(scratch / "again")
    print(
        f"the battery took {seconds:.0f} s, {time.perf_counter() - again:.0f} s when all was done"
    )
    return 0


def environment(scratch: Path) -> Path:
    """A Python that sees `THERE`, what those need, and nothing else of this one's packages."""
    folder = scratch / "packages"
    folder.mkdir(parents=True)
    waiting, seen = list(THERE), set(MISSING)
    while waiting:
        name = canonical(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [
            re.split(r"[^\w.-]", need)[0]
            for need in package.requires or ()
            if "extra ==" not in need
        ]
        for top in {file.parts[0] for file in package.files or () if file.parts[0] != ".."}:
            source, link = Path(str(package.locate_file(top))), folder / top
            if top != "__pycache__" and source.exists() and not link.exists():
                link.symlink_to(source)
    venv = scratch / "machine"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "there.pth").write_text(f"{folder}\n", encoding="utf-8")
    python = venv / "bin" / "python"
    code = "import torch, transformers, peft, importlib.util as u; assert not u.find_spec('av')"
    subprocess.run([python, "-c", code], check=True)
    return python


def canonical(name: str) -> str:
    """As packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def battery(settings: dict[str, str], *arguments: str) -> None:
    """Runs the script."""
    command = ["bash", str(ROOT / "scripts" / "gpu_battery.sh"), *arguments]
    subprocess.run(command, check=True, env={**os.environ, **settings}, cwd=ROOT)


def check(out: Path) -> None:
    """Raises unless all steps ended well and left what they should."""
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    steps = [entry for entry in lines if "code" in entry]
    bad = [entry for entry in steps if entry["code"] != 0]
    # pytest's exit code of a run in which nothing was left to run: without a GPU, all are skipped.
    assert not bad, bad
    done = {entry["step"] for entry in steps}
    wanted = {"compile", "rules", "buckets-auto", "loops", "buckets-int8", "wan-buckets"}
    assert wanted | {"loops-50", "wan-loops", "ops", "demo"} <= done, done
    sections = json.loads((out / "flux_cpu.json").read_text())["sections"]
    assert {"buckets", "kernels", "loops"} <= sections.keys(), list(sections)
    files = sorted(path.name for path in out.iterdir())
    assert len(files) <= MOST_FILES, files
    assert "over the floor" in (out / "summary.md").read_text(), "a summary without a table"


if __name__ == "__main__":
    sys.exit(main())
