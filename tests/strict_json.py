"""JSON as the standard has it: without NaN and infinities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def strict(path: Path) -> dict[str, Any]:
    """What a file holds."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return data
