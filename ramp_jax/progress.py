"""Progress that says what is being done: a bar on a terminal, elsewhere a line now and then."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_WORTH_SAYING = 1.0  # seconds of work
_PAUSE = 60.0  # seconds between two lines


def track(items: Iterable[T], doing: str, unit: str) -> Iterator[T]:
    """Iterate with progress on standard error; nothing is shown for work that ends within a second.

    Where that is no terminal, or `NO_COLOR` or `TERM=dumb` ask for plain text, a line is written every minute and one
    at the end.
    """
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        return iter(tqdm(items, desc=doing, unit=unit, delay=_WORTH_SAYING, dynamic_ncols=True))
    return _in_lines(items, doing)


def _in_lines(items: Iterable[T], doing: str) -> Iterator[T]:
    begun = said = time.monotonic()
    total = len(items) if isinstance(items, Sized) else None
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said >= _PAUSE and done != total:
            said = time.monotonic()
            _say(f"{doing}: {_how_far(done, total, said - begun)}")
    if (took := time.monotonic() - begun) >= _WORTH_SAYING:
        _say(f"{doing}: all {done} in {took:.0f} s")


def _how_far(done: int, total: int | None, seconds: float) -> str:
    """Items and seconds so far and, where it is known how many there are, the time of day at which they end."""
    if total is None:
        return f"{done} after {seconds:.0f} s"
    ends = time.localtime(time.time() + seconds / done * (total - done))
    return f"{done} of {total} after {seconds:.0f} s, ends about {time.strftime('%H:%M', ends)}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
