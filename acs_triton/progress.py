"""Progress of long steps on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int, str], None]
"""Called with what is done, what there is to do, and a word on the state."""
Stage = Callable[[str], Progress]
"""Called with the title of each long step; returns what that step reports to."""

_BAR = "{desc} {percentage:3.0f} % {bar:20} {elapsed} {postfix}"


def silent(title: str) -> Progress:
    """A Stage that shows nothing."""
    return lambda done, total, text: None


def stage(title: str) -> Progress:
    """A progress bar on a terminal, a few plain lines elsewhere; both on stderr."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return _bar(tqdm(total=0, desc=f"{title:38s}", bar_format=_BAR, leave=True))
    return _lines(title)


def _bar(bar: Any) -> Progress:
    def show(done: int, total: int, text: str) -> None:
        bar.total = total
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show


def _lines(title: str) -> Progress:
    shown = 0

    def show(done: int, total: int, text: str) -> None:
        nonlocal shown
        quarter = 4 * done // total
        if quarter > shown:
            shown = quarter
            print(f"{title:38s} {25 * quarter:3d} %  {text}".rstrip(), file=sys.stderr, flush=True)

    return show
