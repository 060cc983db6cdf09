"""Pieces of local files: few open at a time, what is in memory read at once, what is on disk announced first and read by threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from infimed.contracts import DataFault

_OPEN_FILES = 64
_NO_WAIT = getattr(os, "RWF_NOWAIT", None)  # Linux; elsewhere every page counts as near
_WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", None)

Map = Callable[[Callable, Iterable], Iterable]


class File:
    """An open file that closes when the last one who holds it lets go, so that a thread may go on reading what the open files dropped."""

    def __init__(self, descriptor: int) -> None:
        """Own an open descriptor."""
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close."""
        close(self.descriptor)

    def read(self, offset: int, size: int) -> bytes | DataFault:
        """Return bytes from an offset on, fewer where the file ends."""
        try:
            return os.pread(self.descriptor, size, offset)
        except OSError as error:
            return DataFault("unreadable", f"at byte {offset}: {error.strerror}")
        except (MemoryError, OverflowError):  # a size that only a damaged index can ask for
            return DataFault("unreadable", f"at byte {offset}: {size} bytes are more than the memory holds")

    def announce(self, offset: int, size: int) -> None:
        """Let the kernel begin to read what is asked for next."""
        if _WILL_NEED is not None and size:
            os.posix_fadvise(self.descriptor, offset, size, _WILL_NEED)

    def is_near(self, offset: int, size: int, *, probe: bytearray) -> bool:
        """Say whether the last byte asked for is in memory; `probe`: one byte to read into."""
        if _NO_WAIT is None or not size:
            return True
        try:
            os.preadv(self.descriptor, [probe], offset + size - 1, _NO_WAIT)
        except OSError:  # it would wait, or the file system (of a network, often) cannot tell
            return False
        return True


class OpenFiles:
    """The files used last."""

    def __init__(self) -> None:
        """Begin with none."""
        self._files: OrderedDict[str, File] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, opener: Callable[[], int]) -> File:
        """Return the file kept under a name, or keep the descriptor that `opener` returns. Raises: what `opener` raises."""
        with self._lock:
            if file := self._files.get(name):
                self._files.move_to_end(name)
                return file
        file = File(opener())  # not under the lock: it may download
        with self._lock:
            self._files[name] = file
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def local(self, path: str) -> File | DataFault:
        """Open a local file."""
        try:
            return self.get(path, lambda: os.open(path, os.O_RDONLY))
        except OSError as error:
            return DataFault("unreadable", f"{path}: {error.strerror}")


def read_pieces(pieces: Sequence[tuple[File, int, int]], *, threads: int, threaded: Callable[[], Map]) -> list[bytes | DataFault]:
    """Read (file, offset, size), sorted by place. `threaded` returns a map over threads, for when one is needed.

    Waking a thread costs more than copying 56 KB that are in memory, so only pieces on disk go to threads, a contiguous share each.
    """
    for file, offset, size in pieces:
        file.announce(offset, size)
    probe = bytearray(1)
    found = [file.read(offset, size) if file.is_near(offset, size, probe=probe) else None for file, offset, size in pieces]
    far = [number for number, blob in enumerate(found) if blob is None]
    share = -(-len(far) // threads) or 1
    shares = [far[i : i + share] for i in range(0, len(far), share)]
    run = threaded() if len(shares) > 1 else map
    for numbers, blobs in zip(shares, run(lambda numbers: [pieces[n][0].read(*pieces[n][1:]) for n in numbers], shares), strict=True):
        for number, blob in zip(numbers, blobs, strict=True):
            found[number] = blob
    return found
