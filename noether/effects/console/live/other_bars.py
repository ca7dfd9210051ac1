"""Progress bars that other libraries draw on the same terminal: whether there are any, and how to print above them."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import IO


def others_draw() -> bool:
    """Return whether tqdm, rich or a framework shows a progress bar of others now."""
    return bool(_ANNOUNCED) or bool(_tqdm_bars()) or _find_rich_proxy() is not None or _has_rich_display()


_ANNOUNCED: Final[set[int]] = set()


def announce_bar(owner: object, *, is_shown: bool) -> None:
    """Tell whether a framework shows a bar that it draws again from the beginning of the line, as Keras does.

    Args:
        owner: What runs while the bar is shown, such as the callback of an integration.
        is_shown: Whether it is shown from now on.
    """
    (_ANNOUNCED.add if is_shown else _ANNOUNCED.discard)(id(owner))


def removed_bars(file: IO[str]) -> AbstractContextManager[Any]:
    """Return a context in which the bars of others are not on the terminal; later these are drawn again.

    Args:
        file: Where the lines go that are written in the context.
    """
    if _ANNOUNCED:
        file.write("\r\x1b[2K" if _is_terminal(file) else "\n")
    tqdm = _find_tqdm()
    if tqdm is None or not _tqdm_bars():
        return nullcontext()
    context: AbstractContextManager[Any] = tqdm.external_write_mode(file=file)
    return context


def choose_output(file: IO[str]) -> IO[str]:
    """Return where lines for `file` go: while a bar of rich is shown, it prints what is written to the standard output.

    Args:
        file: The standard output, or another file that is returned unchanged.
    """
    proxy = _find_rich_proxy()
    return file if proxy is None or proxy.rich_proxied_file is not file else proxy


def _find_tqdm() -> Any:
    module = sys.modules.get("tqdm.std")  # that a program which never imports it does not wait for the import
    return None if module is None else getattr(module, "tqdm", None)


def _tqdm_bars() -> list[Any]:
    """Return the bars of tqdm on a terminal that are open."""
    tqdm = _find_tqdm()
    bars = list(getattr(tqdm, "_instances", ()))  # a copy, because other threads open and close bars
    return [bar for bar in bars if not bar.disable and _is_terminal(getattr(bar, "fp", None))]


def _is_terminal(file: Any) -> bool:
    try:
        return bool(file.isatty())
    except (AttributeError, ValueError):  # no file, or a closed one
        return False


def _find_rich_proxy() -> Any:
    """Return the file with which a bar of rich has replaced the standard output; None if there is none."""
    return sys.stdout if hasattr(sys.stdout, "rich_proxied_file") else None


def _has_rich_display() -> bool:
    rich = sys.modules.get("rich")
    console = getattr(rich, "_console", None)  # that of the process, if one is used
    return bool(getattr(console, "_live_stack", None) or getattr(console, "_live", None))
