"""PNG files of arrays of pixels, and several images side by side."""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any, Final

import numpy as np

from noether.core.artifacts import PNG

_COLOUR_TYPES: Final = {1: 0, 3: 2, 4: 6}
"""Of PNG, by the number of channels: gray, RGB, RGB with opacity."""
_SIZES: Final = struct.Struct(">II")
_SIZES_AT: Final = 16
"""Place of width and height in a file: after its first bytes, and the length and name of its first chunk."""
_GAP: Final = 1
_GRAY: Final = 128

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def encode_png(pixels: Pixels) -> bytes:
    """Return an image as a PNG file; the format is described in RFC 2083.

    Args:
        pixels: Of shape `(height, width, channels)` with 1, 3 or 4 channels, dtype uint8.

    Example:
        >>> encode_png(np.zeros((2, 3, 1), dtype=np.uint8)).startswith(PNG)
        True
    """
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return PNG + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def png_size(content: bytes) -> tuple[int, int]:
    """Return width and height of a PNG file.

    Raises:
        ValueError: If it is cut off.

    Example:
        >>> png_size(encode_png(np.zeros((2, 3, 1), dtype=np.uint8)))
        (3, 2)
    """
    if len(content) < _SIZES.size + _SIZES_AT:
        raise ValueError(f"a PNG file of {len(content)} bytes is cut off")
    width, height = _SIZES.unpack_from(content, _SIZES_AT)
    return width, height


def tile(images: Pixels) -> Pixels:
    """Return images side by side in one image, in rows of about as many as there are rows, one pixel apart.

    Args:
        images: Of shape `(n, height, width, channels)`, dtype uint8.

    Example:
        >>> tile(np.zeros((5, 8, 8, 1), dtype=np.uint8)).shape  # two rows of three
        (17, 26, 1)
    """
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    step, stride = height + _GAP, width + _GAP
    sheet = np.full((rows * step - _GAP, columns * stride - _GAP, channels), _GRAY, dtype=np.uint8)
    if channels == 4:  # noqa: PLR2004  # with opacity
        sheet[..., 3] = 0
    for number, image in enumerate(images):
        top, left = number // columns * step, number % columns * stride
        sheet[top : top + height, left : left + width] = image
    return sheet
