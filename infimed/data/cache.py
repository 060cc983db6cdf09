"""A folder of blocks of remote files, capped in size and shared by the processes of one machine.

A block is written to `NAME.part` under a lock that dies with its process, and gets its name when it is complete: whoever is killed leaves
nothing that another one would believe. What was longest unused goes first. Files of other names in the folder are never touched.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from infimed.contracts import UserError

_OURS = re.compile(r"[0-9a-f]{32,}\.(block|part)")
_SLACK = 20  # one part in so many of the cap is freed at a time, so that the folder is seldom looked through


class Cache:
    """Blocks by name. Holds nothing but paths: safe to fork and to pickle."""

    def __init__(self, folder: str | Path, *, max_bytes: int | None) -> None:
        """`max_bytes`: cap of all complete blocks together; None for no cap. Raises: UserError for a folder that cannot be made."""
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._ledger = self.folder / "blocks.bytes"  # counts the bytes of all blocks; after a kill rather too many than too few
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache={folder}: {error.strerror}; expected a folder that can be written to") from None

    def path(self, name: str) -> Path:
        """Say where block `name` (hexadecimal, 32 digits or more) lies, or would."""
        return self.folder / f"{name}.block"

    def open(self, name: str, size: int, fill: Callable[[Path], None]) -> int:
        """Return a descriptor of a block of `size` bytes; when it is not here, one process at a time lets `fill` write it to a path.

        Raises: UserError for a block beyond the cap; OSError when the folder cannot be written to; whatever `fill` raises.
        """
        if self.max_bytes is not None and size > self.max_bytes:
            raise UserError(f"data.cache_gb={self.max_bytes / 2**30:.3g} cannot hold one block of {size / 2**30:.3g} GB; raise it")
        while True:
            file = self._complete(name, size)
            if file is None:
                file = self._make(name, size, fill)
            if file is not None:
                return file

    def _complete(self, name: str, size: int) -> int | None:
        """Open a block and note that it is used; a torn one (of another size) counts as absent."""
        try:
            file = os.open(self.path(name), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != size:
            os.close(file)
            return None
        with suppress(PermissionError):  # a block that another user wrote
            os.utime(file)
        return file

    def _make(self, name: str, size: int, fill: Callable[[Path], None]) -> int | None:
        """Write a block; None when another process made it while we waited for its lock."""
        part = self.folder / f"{name}.part"
        file = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        made = False
        try:
            with _locked(file):
                if not _is_at(file, part):
                    return None
                if (found := self._complete(name, size)) is not None:  # made between our look at it and our opening of the part
                    part.unlink()
                    return found
                fill(part)
                if os.fstat(file).st_size != size:
                    raise OSError(f"{os.fstat(file).st_size} of {size} bytes were written")
                self._admit(part, name, size)
                made = True
                return file
        finally:
            if not made:
                os.close(file)

    def _admit(self, part: Path, name: str, size: int) -> None:
        """Give a complete block its name, after making room for it."""
        if self.max_bytes is None:
            part.replace(self.path(name))
            return
        ledger = os.open(self._ledger, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with _locked(ledger):
                counted = os.pread(ledger, 20, 0)
                used = int(counted) if counted.isdigit() else self._make_room(self.max_bytes)
                if used + size > self.max_bytes:
                    used = self._make_room(max(0, self.max_bytes - size - self.max_bytes // _SLACK))
                os.pwrite(ledger, b"%020d" % (used + size), 0)
                part.replace(self.path(name))
        finally:
            os.close(ledger)

    def _make_room(self, target: int) -> int:
        """Remove what was longest unused until `target` bytes are left, and parts that nobody writes any more; return the bytes left."""
        blocks = []
        for entry in os.scandir(self.folder):
            if _OURS.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    if entry.name.endswith(".part"):
                        _remove_abandoned(Path(entry.path))
                    else:
                        blocks.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        left = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if left <= target:
                break
            Path(path).unlink(missing_ok=True)
            left -= size
        return left


def _remove_abandoned(part: Path) -> None:
    file = os.open(part, os.O_RDWR)
    try:
        with _locked(file, fcntl.LOCK_NB), suppress(FileNotFoundError):
            if _is_at(file, part):
                part.unlink()
    except BlockingIOError:  # being written
        pass
    finally:
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    """Say whether an open file still has this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


@contextmanager
def _locked(file: int, how: int = 0) -> Iterator[None]:
    """Hold the lock of an open file; let go of explicitly, because a forked child shares the descriptor and would keep it."""
    fcntl.flock(file, fcntl.LOCK_EX | how)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
