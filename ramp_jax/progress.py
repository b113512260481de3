"""Progress bars that say what is being done."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], doing: str, unit: str) -> Iterator[T]:
    """Iterate with a bar on standard error; nothing is shown for work that ends within a second."""
    return iter(tqdm(items, desc=doing, unit=unit, delay=1.0, dynamic_ncols=True))
