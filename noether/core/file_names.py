"""Names of files made of metric keys and other text: no two texts get one name, and most names can be read back.

A name is legal on Linux, macOS and Windows: it has only ASCII letters, digits and `_-=.%`, and no dot at its end. A
file system that normalizes Unicode does not change it. The case of letters stays: where names ignore it, keys that
differ only in case would share a file, so `BestCheckpointCallback` refuses them.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final

from noether.core.text import escape_controls

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

MAX_LENGTH: Final = 100
"""Characters of an escaped text: with what stands around it, such as `best_model.`, it fits into the name of a file."""
_MAX_PART: Final = 200
_BEST: Final = "best_model."
_HASH_DIGITS: Final = 32
_SHORTENED: Final = "%-"
"""Stands before the hash in a name that was shortened, and nowhere else."""

_DOT_OF_NUMBER: Final = r"(?<=[0-9])\.(?=[0-9])"
_SLASH: Final = r"(?<![0-9])/(?!\Z)|/(?![0-9]|\Z)"
_TRANSLATED: Final = re.compile(rf"(?P<same>{_DOT_OF_NUMBER})|(?P<dot>{_SLASH})|[^A-Za-z0-9_=\-]")
_UNSAFE_IN_PATHS: Final = re.compile(r"[^A-Za-z0-9_=.\-]|\.\Z")
_PIECE: Final = re.compile(r"%[0-9A-F]{2}|[^%]", re.DOTALL)
_DEVICE: Final = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|\Z)", re.IGNORECASE)
_TOLERANCE: Final = re.compile(r"\.tolerance=[0-9]+\Z")


def escape_name(text: str) -> str:
    """Return text as a part of a file name; no two texts give the same result.

    `/` becomes `.`. Any other character than letters, digits and `_-=` becomes `%` and two hexadecimal digits for each
    byte of its UTF-8, as in RFC 3986, section 2.1. Between two digits a `.` stays, as in `ema=0.999`, and `/` becomes
    `%2F`, as at the end. A result of more than 100 characters is cut, and ends in `%-` and a hash of the text.

    Example:
        >>> escape_name("val/accuracy"), escape_name("val.accuracy"), escape_name("recall@10/ema=0.9")
        ('val.accuracy', 'val%2Eaccuracy', 'recall%4010.ema=0.9')
        >>> escape_name("val/" + "a" * 200)[60:80]
        'aaaaaa%-c51bdd2ea4cd'
    """

    def translate(found: re.Match[str]) -> str:
        return found["same"] or ("." if found["dot"] else _percent_encode(found[0]))

    return _limit_length(_TRANSLATED.sub(translate, text), text, MAX_LENGTH)


def unescape_name(name: str) -> str | None:
    """Return the text of which `escape_name` made a name; None if it was shortened, or is not such a name.

    Example:
        >>> unescape_name("recall%4010.ema=0.9"), unescape_name("a%-71ab"), unescape_name("100%")
        ('recall@10/ema=0.9', None, None)
    """
    pieces = _PIECE.findall(name)
    content = bytearray()
    for before, piece, after in zip(["", *pieces], pieces, [*pieces[1:], ""], strict=False):
        if piece == "." and not (_is_digit(before) and _is_digit(after)):
            content += b"/"
        else:
            content += bytes.fromhex(piece[1:]) if len(piece) > 1 else piece.encode(errors="surrogatepass")
    try:
        text = content.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return None
    return text if escape_name(text) == name else None


def best_pointer(metric_key: str, tolerance: int | None = None) -> str:
    """Return the name of the pointer to the checkpoint at which a metric was best.

    Args:
        metric_key: Key of the metric.
        tolerance: Firings without improvement after which early stopping would have ended the run; None for no end.

    Example:
        >>> best_pointer("val/accuracy"), best_pointer("val/recall@10", tolerance=3)
        ('best_model.val.accuracy', 'best_model.val.recall%4010.tolerance=3')
    """
    name = escape_name(metric_key)
    if _TOLERANCE.search(f".{name}"):  # the key itself ends as the pointer of a tolerance does
        name = _percent_encode("=").join(name.rsplit("=", 1))
    return f"{_BEST}{name}" if tolerance is None else f"{_BEST}{name}.tolerance={tolerance}"


def find_name(text: str, existing: Collection[str]) -> str:
    """Return the name of a checkpoint or pointer that a user wrote, with or without escapes; else the text unchanged.

    Args:
        text: A name as it is on the disk, or with the metric key as it was logged, such as `best_model.val/recall@10`.
        existing: The names on the disk.

    Example:
        >>> names = ["latest", "best_model.val.recall%4010", "best_model.val.recall%4010.tolerance=3"]
        >>> find_name("best_model.val/recall@10", names), find_name("best_model.val/recall@10.tolerance=3", names)
        ('best_model.val.recall%4010', 'best_model.val.recall%4010.tolerance=3')
    """
    return next((name for name in _candidates(text) if name in existing), text)


def describe_name(name: str) -> str:
    """Return the name of a checkpoint or pointer as messages show it: if it has escapes, with the text that they mean.

    Example:
        >>> describe_name("best_model.val.recall%4010"), describe_name("best_model.val.accuracy")
        ('best_model.val.recall%4010 (best_model.val/recall@10)', 'best_model.val.accuracy')
    """
    head, rest, suffix = _split_name(name)
    text = unescape_name(rest) if "%" in name else None
    return name if text is None else f"{name} ({head}.{escape_controls(text)}{suffix})"


def escape_path(path: str) -> str:
    """Return a relative path of files as its parts are named on the disk; no two paths give the same result.

    Each part between slashes is escaped as by `escape_name`, but dots stay. An empty part, `..`, and the names that
    Windows reserves for devices are escaped too, so no path leads out of its folder.

    Example:
        >>> escape_path("outputs/E1/U100"), escape_path("../worst 10%/nul")
        ('outputs/E1/U100', '.%2E/worst%2010%25/%6Eul')
    """
    return "/".join(map(_escape_part, path.split("/")))


def _escape_part(part: str) -> str:
    escaped = _UNSAFE_IN_PATHS.sub(lambda found: _percent_encode(found[0]), part)
    if _DEVICE.match(escaped):
        escaped = _percent_encode(escaped[0]) + escaped[1:]
    return _limit_length(escaped or "%", part, _MAX_PART)


def _candidates(text: str) -> Iterator[str]:
    """Yield the names that a text may mean: itself, and its part after the first dot escaped."""
    yield text
    head, rest, suffix = _split_name(text)
    if text.startswith(_BEST):
        yield best_pointer(rest + suffix)
        yield best_pointer(rest) + suffix
    yield f"{head}.{escape_name(rest)}{suffix}"


def _split_name(name: str) -> tuple[str, str, str]:
    """Return a name up to its first dot, what follows, and the end that names a tolerance."""
    head, _, rest = name.partition(".")
    end = _TOLERANCE.search(rest)
    return (head, rest[: end.start()], end[0]) if end else (head, rest, "")


def _percent_encode(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode(errors="surrogatepass"))


def _limit_length(escaped: str, text: str, length: int) -> str:
    """Return an escaped text, or if it is longer than `length`, its beginning and a hash of the text."""
    if len(escaped) <= length:
        return escaped
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_HASH_DIGITS]
    head = escaped[: length - len(_SHORTENED) - _HASH_DIGITS]
    return f"{re.sub('%[0-9A-F]?$', '', head)}{_SHORTENED}{digest}"  # not in the middle of an escape


def _is_digit(piece: str) -> bool:
    return piece.isascii() and piece.isdigit()
