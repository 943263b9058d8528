"""Images as clients upload them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def file_of(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(levels).save(file, kind)
    return file.getvalue()


def bomb(side: int = 10_000) -> bytes:
    """A PNG of a hundred megapixels in some kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + side // 8)) for _ in range(side)) + rows.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts
