"""Stage `artwork`: the drawings that scenes show, from two packages of emoji.

`@lobehub/fluent-emoji-3d` (Microsoft's Fluent emoji, MIT) has shaded drawings of 256 px,
`emoji-datasource-google` (MIT; its images are Noto's, Apache-2.0) flat ones of 64 px, and the
category of each. Both are fetched by npm; what is kept of them is one file in the work folder.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import tarfile

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from demo_training.kind import Kind
from demo_training.settings import Settings

Pixels = npt.NDArray[np.uint8]
"""``[side, side, 4]``, RGB and opacity."""

FLUENT, NOTO = "@lobehub/fluent-emoji-3d@1.1.0", "emoji-datasource-google@16.0.0"
FILE = "drawings.npz"
TABLE = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "study" / "drawings.json"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
GROUPS = {
    "face": ("face-",),
    "heart": ("heart",),
    "animal": ("animal-mammal", "animal-amphibian", "animal-reptile", "cat-face", "monkey-face"),
    "bird": ("animal-bird",),
    "fish": ("animal-marine",),
    "bug": ("animal-bug",),
    "flower": ("plant-flower",),
    "plant": ("plant-other",),
    "fruit": ("food-fruit",),
    "vegetable": ("food-vegetable",),
    "sweet": ("food-sweet",),
    "meal": ("food-prepared", "food-asian"),
    "drink": ("drink",),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
    "house": ("place-building",),
    "tool": ("tool",),
}
"""What a caption calls a drawing, by how its subcategory in the packages begins."""
_SIDE, _SURVEYED = 96, 48
_HUES = (
    ("red", 345, 375),
    ("orange", 15, 28),
    ("yellow", 28, 66),
    ("green", 66, 170),
    ("blue", 170, 250),
    ("purple", 250, 300),
    ("pink", 300, 345),
)
"""Degrees, from and to."""
_OPAQUE, _FAINT, _BRIGHT, _DARK, _PALE = 0.5, 0.22, 0.75, 0.72, 0.55
_LEAST_SHARE = 0.45


@dataclasses.dataclass(frozen=True, slots=True)
class Drawing:
    """One drawing.

    Attributes:
        group: What it is.
        colour: Of about half of what is seen of it or more; None: it has several.
        pixels: Itself.
    """

    group: str
    colour: str | None
    pixels: Pixels


def collect(_: Kind, settings: Settings) -> None:
    """Fetch the packages, keep the drawings of `GROUPS`, and count them by group and colour.

    Raises:
        FileNotFoundError: There is no npm to fetch them with.
    """
    path = settings.work / FILE
    if path.exists():
        tqdm.write(f"artwork: {path} exists, kept")
        return
    fluent, noto = (_fetched(package, settings.work / "packages") for package in (FLUENT, NOTO))
    kept = read_packages(fluent, noto)
    if not kept:
        raise FileNotFoundError(
            f"{settings.work / 'packages'} has no drawings; delete it, try again"
        )
    arrays = {f"{place} {one.group} {one.colour or ''}": one.pixels for place, one in kept.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes names for its own flag
    table = collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    for one in kept.values():
        table[one.group][one.colour or ""] += 1
    target = settings.work / TABLE.name if settings.quick else TABLE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    tqdm.write(f"artwork: {path}, {len(kept)} drawings of {len(table)} groups")


def read_packages(fluent: pathlib.Path, noto: pathlib.Path) -> dict[str, Drawing]:
    """The drawings of unpacked packages, by style and code point."""
    entries = json.loads((noto / "emoji.json").read_text(encoding="utf-8"))
    shaded = {_code(path.stem): path for path in (fluent / "assets").glob("*.webp")}
    kept = {}
    for entry in entries:
        group, code = _group(entry["subcategory"]), _code(entry["unified"])
        if group is None:
            continue
        for style, path in (
            ("fluent", shaded.get(code)),
            ("noto", noto / "img" / "google" / "64" / entry["image"]),
        ):
            if path is not None and path.is_file():
                with Image.open(path) as image:
                    kept[f"{style}/{code}"] = _drawing(group, image)
    return kept


@functools.cache
def load_drawings(path: pathlib.Path) -> tuple[Drawing, ...]:
    """What `collect` has kept.

    Raises:
        ValueError: It has not run.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there: run the stage 'artwork' first")
    with np.load(path) as file:
        found = []
        for name in file.files:
            _, group, colour = name.split(" ")
            found.append(Drawing(group, colour or None, file[name]))
    return tuple(found)


@functools.cache
def counted() -> dict[str, dict[str, int]]:
    """How many drawings there are by group and colour (`""`: several), by the repository's file."""
    table: dict[str, dict[str, int]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def colour_of(image: Image.Image) -> str | None:
    """The colour that about half of what is seen of an image with opacity has, if there is one."""
    small = np.asarray(image.convert("RGBA").resize((_SURVEYED, _SURVEYED), Image.Resampling.BOX))
    flat = small.reshape(-1, 4).astype(np.float32) / 255
    red, green, blue = rgb = flat[flat[:, 3] > _OPAQUE, :3].T
    high, spread = rgb.max(0), np.ptp(rgb, axis=0)
    over = np.where(spread > 0, spread, 1)
    hue = np.select(
        [high == red, high == green],
        [(green - blue) / over % 6, (blue - red) / over + 2],
        (red - green) / over + 4,
    )
    hue, saturation = hue * 60, spread / np.maximum(high, 1e-6)
    faint = saturation < _FAINT
    brown = (hue >= 5) & (hue < 45) & (high < _DARK)
    pale_red = ((hue >= 330) | (hue < 15)) & (saturation < _PALE) & (high > 0.8)
    shares = {"white": faint & (high >= _BRIGHT)}
    for name, low, up in _HUES:
        inside = ((hue >= low) & (hue < up)) | ((hue + 360 >= low) & (hue + 360 < up))
        inside &= ~faint & ~brown
        shares[name] = inside | (pale_red & ~faint) if name == "pink" else inside & ~pale_red
    share, name = max((mask.mean(), name) for name, mask in shares.items())
    return name if share >= _LEAST_SHARE else None


def _drawing(group: str, image: Image.Image) -> Drawing:
    whole = image.convert("RGBA")
    colour = colour_of(whole)
    if whole.width > _SIDE:
        whole = whole.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return Drawing(group, colour, np.asarray(whole))


def _group(subcategory: str) -> str | None:
    return next((name for name, starts in GROUPS.items() if subcategory.startswith(starts)), None)


def _code(name: str) -> str:
    """Code points without the sign that asks for a picture, which the packages put differently."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def _fetched(package: str, folder: pathlib.Path) -> pathlib.Path:
    """An npm package, unpacked."""
    target = folder / package.strip("@").replace("/", "_")
    if target.is_dir():
        return target / "package"
    if (npm := shutil.which("npm")) is None:
        raise FileNotFoundError("npm is not installed, which fetches the drawings; install Node.js")
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", package, "--json"]
    done = subprocess.run(  # noqa: S603 - a fixed command
        command, cwd=folder, check=True, capture_output=True, text=True
    )
    name = json.loads(done.stdout)[0]["filename"].strip("@").replace("/", "-")
    partial = target.with_suffix(".partial")
    with tarfile.open(folder / name) as archive:
        archive.extractall(partial, filter="data")
    partial.replace(target)
    return target / "package"
