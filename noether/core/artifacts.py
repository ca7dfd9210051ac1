"""Artifacts: figures, images, histograms, tables, texts and files that a run keeps and shows, as effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import numpy as np
import torch

from noether.core.effect import Effect, LogText
from noether.core.errors import Problem, SettingsError
from noether.core.tensors.dtensors import is_distributed

if TYPE_CHECKING:
    Array = torch.Tensor | np.ndarray[Any, Any]


class PathLike(Protocol):
    """A path, such as a `pathlib.Path`."""

    def __fspath__(self) -> str:
        """Return it as a text."""


PNG: Final = b"\x89PNG\r\n\x1a\n"
"""The first bytes of a PNG file."""
_SVG_HEAD_BYTES: Final = 4096
_CHANNELS: Final = (1, 3, 4)
_CELLS: Final = (str, int, float, bool, type(None), np.generic)


@dataclass(frozen=True, eq=False)
class Artifact(Effect):
    """The base of the effects that write a file of a run under a key; `LogText` with a key writes one, too.

    The interpreter reads tensors, arrays and figures when it runs the effect, at its event; later changes have no
    effect on the file.

    Attributes:
        kind: Name of its type in logs, such as `figure`.

    Args:
        key: Name of the artifact, such as `val/confusion`; one event writes each key once.
    """

    kind: ClassVar[str]
    key: str

    def __post_init__(self) -> None:
        _require(_is_text(self.key) and self.key != "", "key", f"{self.key!r} is not a name: write a text")
        self._check()

    def _check(self) -> None:
        """Refuse fields that cannot be written."""


@dataclass(frozen=True, eq=False)
class LogFigure(Artifact):
    """Write a figure, and close it if pyplot manages it.

    Args:
        key: Name of the artifact.
        figure: Figure of matplotlib, which is drawn as PNG when the effect is run; or the bytes of a PNG or SVG file.
        caption: Text below the figure.

    Raises:
        SettingsError: If `figure` is neither, or `caption` is not a text.

    Example:
        >>> from matplotlib.figure import Figure
        >>> figure = Figure(); _ = figure.subplots().plot([1, 4, 9])
        >>> LogFigure("squares", figure, caption="three squares").key
        'squares'
    """

    kind = "figure"
    figure: Any
    caption: str = ""

    def _check(self) -> None:
        figure, advice = self.figure, "give a Figure of matplotlib, or the bytes of a PNG or SVG file"
        if isinstance(figure, bytes):
            known = figure.startswith(PNG) or is_svg(figure)
            _require(known, "figure", f"bytes that begin with {figure[:12]!r} are not a PNG or SVG file: {advice}")
        elif not hasattr(figure, "savefig"):
            advice = "write its .figure" if hasattr(figure, "get_figure") else advice
            advice = "return LogImages for an array of pixels" if _is_array(figure) else advice
            raise SettingsError([Problem("figure", f"{type(figure).__name__} is not a figure: {advice}")])
        _require(_is_text(self.caption), "caption", f"{self.caption!r} is not a text")


@dataclass(frozen=True, eq=False)
class LogImages(Artifact):
    """Write images, side by side in one PNG file.

    Args:
        key: Name of the artifact.
        images: Pixels of shape `(n, height, width)` or `(n, channels, height, width)` with 1, 3 or 4 channels (gray,
            RGB, RGB and opacity); of dtype uint8, or of a floating dtype with values from 0 to 1.
        captions: Text of each image; empty for no text.

    Raises:
        SettingsError: If shape, dtype or the number of captions does not fit. The interpreter checks the values.

    Example:
        >>> LogImages("digits", torch.rand(9, 8, 8), captions=tuple("123456789")).images.shape
        torch.Size([9, 8, 8])
    """

    kind = "images"
    images: Array
    captions: Sequence[str] = ()

    def _check(self) -> None:
        images = self.images
        _require_array("images", images)
        shape = tuple(images.shape)
        _require(len(shape) in {3, 4} and 0 not in shape, "images", f"shape {shape} {_shape_advice(shape)}")
        if len(shape) == 4:  # noqa: PLR2004  # with channels
            _require(shape[1] in _CHANNELS, "images", f"shape {shape} {_shape_advice(shape)}")
        name = str(images.dtype).removeprefix("torch.")
        _require(
            name == "uint8" or "float" in name, "images", f"dtype {name} is neither uint8 nor floating: convert it"
        )
        _require(
            not _is_text(self.captions) and all(map(_is_text, self.captions)),
            "captions",
            f"{self.captions!r} is not a sequence of texts",
        )
        count = len(self.captions)
        _require(count in {0, shape[0]}, "captions", f"there are {count} for {shape[0]} images: write one for each")
        object.__setattr__(self, "captions", tuple(self.captions))


@dataclass(frozen=True, eq=False)
class LogHistogram(Artifact):
    """Write a histogram, either of values, which are counted when the effect is run, or of known counts.

    Args:
        key: Name of the artifact.
        values: Numbers of any shape; those that are not finite are counted apart.
        counts: Number of values in each bin, of shape `(bins,)`; instead of `values`.
        edges: Edges of the bins, ascending, of shape `(bins + 1,)`; with `counts`.
        bins: Number of bins for `values`, all of one width between the least and the largest finite value.
        nan: Number of values that are NaN; with `counts`.
        infinite: Number of values that are infinite; with `counts`.

    Raises:
        SettingsError: If both values and counts are given, or neither; or if shapes or dtypes do not fit.

    Example:
        >>> LogHistogram("ages", [31, 42, 28, 35], bins=4).bins
        4
        >>> LogHistogram("ages", counts=[3, 1], edges=[20, 40, 60]).counts
        [3, 1]
    """

    kind = "histogram"
    values: Array | Sequence[float] | None = None
    counts: Array | Sequence[int] | None = None
    edges: Array | Sequence[float] | None = None
    bins: int = 64
    nan: int = 0
    infinite: int = 0

    def _check(self) -> None:
        known = self.counts is not None and self.edges is not None
        some = self.counts is not None or self.edges is not None
        _require((self.values is None) == known == some, "values", "give either values, or counts and edges")
        _require(type(self.bins) is int and self.bins >= 1, "bins", f"{self.bins!r} is not a number of bins")
        if self.values is not None:
            _require_numbers("values", self.values)
        else:
            (counts,), (edges,) = _require_numbers("counts", self.counts, 1), _require_numbers("edges", self.edges, 1)
            _require(
                edges == counts + 1 and counts > 0,
                "edges",
                f"there are {edges} for {counts} counts: write one more edge than counts, and at least one count",
            )


@dataclass(frozen=True, eq=False)
class LogTable(Artifact):
    """Write a table.

    Args:
        key: Name of the artifact.
        columns: Names of the columns, each once.
        rows: Rows with one value for each column: texts, numbers, booleans, None, or tensors with one number.

    Raises:
        SettingsError: If a row has another length, or a value another type; the message names the row and the column.

    Example:
        >>> LogTable("worst", ["image", "loss"], [[17, 2.5], [3, 1.25]]).rows
        ((17, 2.5), (3, 1.25))
    """

    kind = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def _check(self) -> None:
        names = () if isinstance(self.columns, str) else tuple(self.columns)
        valid = bool(names) and all(map(_is_text, names)) and len(set(names)) == len(names)
        _require(valid, "columns", f"{self.columns!r} are not names of columns: write a list of texts, each once")
        rows = tuple(self.rows)
        for number, row in enumerate(rows):
            _require(
                isinstance(row, (list, tuple)) or _is_array(row),
                f"rows[{number}]",
                f"{row!r} is not a row: write a list of {len(names)} values",
            )
            _require(
                len(row) == len(names), f"rows[{number}]", f"it has {len(row)} values for {len(names)} columns: {names}"
            )
            for name, cell in zip(names, row, strict=True):
                is_number = isinstance(cell, torch.Tensor) and cell.numel() == 1
                _require(
                    is_number or isinstance(cell, _CELLS),
                    f"rows[{number}]",
                    f"column {name!r} holds a {type(cell).__name__}: write a text, a number, a boolean or None",
                )
        object.__setattr__(self, "columns", names)
        object.__setattr__(self, "rows", tuple(map(tuple, rows)))


@dataclass(frozen=True, eq=False)
class LogFile(Artifact):
    """Write a file of any kind.

    Args:
        key: Name of the artifact.
        content: Its bytes; or the path of a file, which is read when the effect is run.
        name: Name of the file in reports and log services, such as `model.onnx`; by default that of the path.

    Raises:
        SettingsError: If the name is missing or is a path.

    Example:
        >>> LogFile("mesh", b"v 0 0 0", "cube.obj").name
        'cube.obj'
        >>> LogFile("mesh", "meshes/cube.obj").name
        'cube.obj'
    """

    kind = "file"
    content: bytes | str | PathLike
    name: str = ""

    def _check(self) -> None:
        content = self.content
        kind = type(content).__name__
        is_path = isinstance(content, str) or hasattr(content, "__fspath__")
        _require(is_path or isinstance(content, bytes), "content", f"{kind} is neither bytes nor a path")
        if not self.name and is_path:
            object.__setattr__(self, "name", _file_name(str(content)))
        _require(
            _is_text(self.name) and _file_name(self.name) == self.name not in {"", ".", ".."},
            "name",
            f"{self.name!r} is not the name of a file: write one without folders, such as 'model.onnx'",
        )


ARTIFACTS: Final = (LogFigure, LogImages, LogHistogram, LogTable, LogFile)
"""The types of artifacts; `LogText` with a key is an artifact, too."""


def artifact_key(effect: Effect) -> str | None:
    """Return the key under which an effect writes an artifact; None if it is another effect.

    Example:
        >>> artifact_key(LogText("a line")), artifact_key(LogText("a report", key="report"))
        (None, 'report')
    """
    return (effect.key or None) if isinstance(effect, (LogText, Artifact)) else None


def is_svg(content: bytes) -> bool:
    """Return whether the bytes of a file begin as SVG does, after an XML header, comments and a document type.

    Example:
        >>> is_svg(b'<?xml version="1.0"?><svg></svg>'), is_svg(b"<html><svg></svg></html>")
        (True, False)
    """
    head = content[:_SVG_HEAD_BYTES].decode("utf-8-sig", errors="replace").lstrip()
    while head.startswith(("<?", "<!")):
        end = "-->" if head.startswith("<!--") else "?>" if head.startswith("<?") else ">"
        head = head.partition(end)[2].lstrip()
    return head.startswith("<svg")


def _require(condition: bool, field: str, message: str) -> None:  # noqa: FBT001  # the condition reads first
    if not condition:
        raise SettingsError([Problem(field, message)])


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _require_array(field: str, value: Any) -> None:
    _require(_is_array(value), field, f"{type(value).__name__} is not a tensor: write a tensor or an array of numpy")
    _require(
        not is_distributed(value),
        field,
        "each rank has a part of this tensor, and only rank 0 writes: gather it on all ranks first (full_tensor())",
    )


def _require_numbers(field: str, value: Any, dimensions: int | None = None) -> tuple[int, ...]:
    """Return the shape of an array; refuse values that are not real numbers, and another number of dimensions."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = np.asarray(value)
    _require_array(field, value)
    shape, name = tuple(value.shape), str(value.dtype).removeprefix("torch.")
    _require(name == "bool" or "int" in name or "float" in name, field, f"dtype {name} is not one of real numbers")
    _require(dimensions in {None, len(shape)}, field, f"shape {shape} does not have {dimensions} dimension")
    return shape


def _shape_advice(shape: tuple[int, ...]) -> str:
    advice = "is neither (n, height, width) nor (n, channels, height, width) with 1, 3 or 4 channels"
    if len(shape) == 2:  # noqa: PLR2004  # one image
        return f"{advice}: of one image write image[None]"
    if len(shape) == 4 and shape[3] in _CHANNELS:  # noqa: PLR2004  # with the channels last
        return f"{advice}: write images.permute(0, 3, 1, 2)"
    return advice
