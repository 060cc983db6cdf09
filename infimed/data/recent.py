"""A bounded memory of what was made last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Keeps values by key up to a total size and forgets the longest unused first; a pickled copy is empty."""

    def __init__(self, most: int) -> None:
        """`most`: the sizes of all values together; the newest one stays even when it alone is larger."""
        self._most, self._used = most, 0
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T], *, size: int = 1) -> T:
        """Return the value of a key, made now when it is not there."""
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return found[0]
        value = make()
        self._kept[key] = (value, size)
        self._used += size
        while self._used > self._most and len(self._kept) > 1:
            self._used -= self._kept.popitem(last=False)[1][1]
        return value

    def __getstate__(self) -> int:
        """Leave the values behind."""
        return self._most

    def __setstate__(self, most: int) -> None:
        """Begin empty."""
        Recent.__init__(self, most)
