"""Images that clients upload: decoded only where their header admits it."""

from __future__ import annotations

import io
import warnings

from PIL import Image, UnidentifiedImageError

from ddit_rt.serving.errors import ApiError

_FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(data: bytes, name: str, pixels: int) -> Image.Image:
    """An uploaded image.

    Args:
        data: The file.
        name: Name of the field it came in, for messages.
        pixels: The most that it may have; its header says how many, before any is decoded.

    Raises:
        ApiError: It has more, or is no PNG, JPEG or WebP.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > pixels:
                raise _refused(f"{name} has more than {pixels} pixels", name)
            image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise _refused(f"{name} is no PNG, JPEG or WebP that can be read", name) from error
    except SyntaxError as error:  # Pillow's word for a broken PNG
        raise _refused(f"{name} is a broken image", name) from error
    return image


def _refused(message: str, name: str) -> ApiError:
    return ApiError(400, message, param=name, code="invalid_image")
