"""Progress bars that other libraries draw on the same terminal: finding them, and printing above them."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import IO


def has_other_bar() -> bool:
    """Return whether tqdm, rich or a framework shows a progress bar now."""
    return bool(_ANNOUNCED) or bool(_tqdm_bars()) or _find_rich_proxy() is not None or _has_rich_display()


_ANNOUNCED: Final[set[int]] = set()


def announce_bar(owner: object, *, is_shown: bool) -> None:
    """Announce that a framework shows a bar, or no longer shows it; it redraws the bar from the start of its line.

    Keras has such a bar, which cannot be found otherwise.

    Args:
        owner: An object that lives as long as the bar, such as the callback of an integration.
        is_shown: Whether the bar is shown from now on.
    """
    (_ANNOUNCED.add if is_shown else _ANNOUNCED.discard)(id(owner))


def hide_other_bars(file: IO[str]) -> AbstractContextManager[Any]:
    """Return a context that removes the bars of other libraries from the terminal, and draws them again at its end.

    Args:
        file: The file to which the context writes lines.
    """
    if _ANNOUNCED:
        file.write("\r\x1b[2K" if _is_terminal(file) else "\n")
    if not _tqdm_bars():
        return nullcontext()
    context: AbstractContextManager[Any] = _find_tqdm().external_write_mode(file=file)
    return context


def choose_output(file: IO[str]) -> IO[str]:
    """Return the file to write lines to: while rich shows a bar, its proxy of the standard output prints above the bar.

    Args:
        file: The standard output; any other file is returned unchanged.
    """
    proxy = _find_rich_proxy()
    return file if proxy is None or proxy.rich_proxied_file is not file else proxy


def _find_tqdm() -> Any:
    module = sys.modules.get("tqdm.std")  # not imported here, because a program without tqdm would wait for the import
    return None if module is None else getattr(module, "tqdm", None)


def _tqdm_bars() -> list[Any]:
    """Return the open bars of tqdm on a terminal."""
    bars = getattr(_find_tqdm(), "_instances", ())
    if not bars:
        return []
    # A copy, because other threads open and close bars.
    return [bar for bar in list(bars) if not bar.disable and _is_terminal(getattr(bar, "fp", None))]


def _is_terminal(file: Any) -> bool:
    try:
        return bool(file.isatty())
    except (AttributeError, ValueError):  # no file, or a closed one
        return False


def _find_rich_proxy() -> Any:
    """Return the proxy with which a bar of rich has replaced the standard output; None without such a bar."""
    return sys.stdout if hasattr(sys.stdout, "rich_proxied_file") else None


def _has_rich_display() -> bool:
    rich = sys.modules.get("rich")
    console = getattr(rich, "_console", None)  # the console that `rich.print` shares, if the program uses it
    return bool(getattr(console, "_live_stack", None) or getattr(console, "_live", None))
