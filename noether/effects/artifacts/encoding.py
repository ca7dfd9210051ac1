"""Encodes artifacts: the bytes of their files, and plain values for log services such as TensorBoard."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from noether.core.artifacts import LogFigure, LogFile, LogHistogram, LogImages, LogTable, is_svg
from noether.core.effect import LogText
from noether.core.tensors.histograms import count_values
from noether.effects.artifacts.png import encode_png, tile
from noether.effects.disk.json_numbers import to_plain

if TYPE_CHECKING:
    from noether.core.artifacts import Artifact

_SUFFIX: Final = re.compile(r"\.[A-Za-z0-9]{1,12}\Z")


@dataclasses.dataclass(frozen=True)
class EncodedArtifact:
    """An artifact as plain values, which share no memory with tensors or figures of the run.

    Args:
        kind: `figure`, `images`, `histogram`, `table`, `text` or `file`.
        key: Name of the artifact.
        content: The bytes of its file.
        suffix: End of the name of its file, such as `.png`.
        value: Its content for log services: for images, an array of shape `(n, height, width, channels)` and dtype
            uint8; for a histogram or a table, the content of its JSON; for a text, the text; else None.
        caption: Text below a figure or images.
        captions: Text of each image; empty without texts.
        name: Name that the user gave to a file; empty for other kinds.
    """

    kind: str
    key: str
    content: bytes
    suffix: str
    value: Any = None
    caption: str = ""
    captions: tuple[str, ...] = ()
    name: str = ""


@functools.singledispatch
def encode_artifact(effect: Any) -> EncodedArtifact:
    """Return an artifact as a file: copy its tensors to the CPU, draw its figure, or read its file.

    Figures and images become PNG, histograms and tables JSON. The file of a figure depends on nothing but the figure.

    Raises:
        ValueError: If images have values outside of 0 to 1, or the edges of a histogram do not ascend.
        OSError: If a file cannot be read.

    Example:
        >>> artifact = encode_artifact(LogTable("worst", ["image", "loss"], [(17, float("inf"))]))
        >>> artifact.suffix, artifact.content
        ('.json', b'{"columns": ["image", "loss"], "rows": [[17, "Infinity"]]}')
    """
    raise TypeError(f"{type(effect).__name__} is not an artifact")


@encode_artifact.register
def _(effect: LogFigure) -> EncodedArtifact:
    content = effect.figure if isinstance(effect.figure, bytes) else _draw(effect.figure)
    suffix = ".svg" if is_svg(content) else ".png"
    return EncodedArtifact(effect.kind, effect.key, content, suffix, caption=effect.caption)


@encode_artifact.register
def _(effect: LogImages) -> EncodedArtifact:
    images = _to_pixels(effect.images)
    captions = tuple(effect.captions)
    content, caption = encode_png(tile(images)), ", ".join(captions)
    return EncodedArtifact(effect.kind, effect.key, content, ".png", images, caption, captions)


@encode_artifact.register
def _(effect: LogHistogram) -> EncodedArtifact:
    if effect.values is None:
        counts, edges, nan, infinite = _to_array(effect.counts), _to_array(effect.edges), effect.nan, effect.infinite
        if not (np.diff(edges) > 0).all() or not np.isfinite(edges).all():
            raise ValueError(f"the edges {edges.tolist()} do not ascend: write each edge larger than the one before")
        if (counts < 0).any():
            raise ValueError(f"the counts {counts.tolist()} are not all 0 or more")
    else:
        values = effect.values if isinstance(effect.values, torch.Tensor) else torch.as_tensor(np.array(effect.values))
        histogram = count_values(values, effect.bins)
        counts, edges, nan, infinite = histogram.counts.numpy(), histogram.edges.numpy(), *histogram[2:]
    content = {"counts": counts.tolist(), "edges": edges.tolist(), "nan": int(nan), "infinite": int(infinite)}
    return _encode_json(effect, content)


@encode_artifact.register
def _(effect: LogTable) -> EncodedArtifact:
    rows = [[to_plain(_to_scalar(cell)) for cell in row] for row in effect.rows]
    return _encode_json(effect, {"columns": list(effect.columns), "rows": rows})


@encode_artifact.register
def _(effect: LogText) -> EncodedArtifact:
    content = effect.text.encode(errors="backslashreplace")
    return EncodedArtifact(effect.kind, effect.key, content, ".txt", effect.text)


@encode_artifact.register
def _(effect: LogFile) -> EncodedArtifact:
    content = effect.content if isinstance(effect.content, bytes) else Path(effect.content).read_bytes()
    found = _SUFFIX.search(effect.name)
    return EncodedArtifact(effect.kind, effect.key, content, found[0].lower() if found else ".bin", name=effect.name)


def close_figure(effect: object) -> None:
    """Close the figure of an effect if pyplot manages it; otherwise pyplot keeps every figure in memory."""
    pyplot, module = sys.modules.get("matplotlib.pyplot"), sys.modules.get("matplotlib.figure")
    figure = effect.figure if isinstance(effect, LogFigure) else None
    if pyplot is not None and module is not None and isinstance(figure, module.Figure):
        pyplot.close(figure)


def _draw(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # the version of matplotlib is no content
    return buffer.getvalue()


def _encode_json(effect: Artifact, content: dict[str, Any]) -> EncodedArtifact:
    text = json.dumps(content, allow_nan=False)
    return EncodedArtifact(effect.kind, effect.key, text.encode(), ".json", content)


def _to_array(value: Any) -> np.ndarray[Any, Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value  # numpy has no bfloat16
        return value.numpy()  # type: ignore[no-any-return]  # torch has no type of its result
    return np.asarray(value)


def _to_pixels(images: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return images as uint8 of shape `(n, height, width, channels)`."""
    pixels = _to_array(images)
    if pixels.dtype != np.uint8:
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):  # false for NaN, too
            raise ValueError(
                f"the values of images of dtype {str(images.dtype).removeprefix('torch.')} are from 0 to 1, these are "
                f"from {low:.6g} to {high:.6g}: scale them, such as (images - images.min()) / (images.max() - "
                "images.min()), or convert them to uint8"
            )
        pixels = np.rint(pixels * 255).astype(np.uint8)
    return pixels[..., None] if pixels.ndim == 3 else pixels.transpose(0, 2, 3, 1)  # noqa: PLR2004  # no channels


def _to_scalar(cell: Any) -> Any:
    return cell.item() if isinstance(cell, (np.generic, torch.Tensor)) else cell
