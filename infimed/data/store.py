"""Bytes by path, offset and size: local files, and objects of any store that fsspec knows.

Requests are sorted by place. Local ones: `files.py`. Remote ones become spans (neighbours read together, blocks of the cache, or whole
shards) that threads fetch, `read_ahead` bytes in flight at most.
"""

from __future__ import annotations

import atexit
import glob
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from infimed.contracts import DataFault, UserError
from infimed.data.cache import Cache
from infimed.data.files import File, OpenFiles, read_pieces
from infimed.data.remote import BLOCK, Remote, Stat, discreet, is_remote
from infimed.data.spans import Request, Span, block_name, blocks, neighbours

__all__ = ["Access", "Request", "Store", "discreet", "is_remote"]

log = logging.getLogger(__name__)

Access = Literal["ranges", "shards"]


class Store:
    """Reads bytes from wherever they lie. Picklable, safe to fork and to share between threads."""

    def __init__(
        self,
        *,
        threads: int = 4,
        cache: str | Path | None = None,
        cache_bytes: int = 64 * 2**30,
        access: Access = "ranges",
        retries: int = 5,
        read_ahead: int = 2**28,
    ) -> None:
        """Configure; nothing is opened yet.

        Args:
            threads: readers of what is not in memory.
            cache: folder on a local disk for blocks of remote files, shared by all processes of the machine.
            cache_bytes: cap of those blocks; indexes, some 100 bytes a sample, lie beside them uncounted.
            access: `shards` fetches whole objects, once and in sequence, into the cache: for stores where range reads are slow.
            retries: attempts after the first at a remote read, with growing waits.
            read_ahead: bytes in flight from remote stores.

        Raises: UserError that lists every option that cannot be.
        """
        problems = [f"data.read_threads={threads}: expected 1 or more"] if threads < 1 else []
        if access not in ("ranges", "shards"):
            problems.append(f"data.access={access!r}: expected 'ranges' or 'shards'")
        if access == "shards" and cache is None:
            problems.append("data.access=shards keeps whole shards in a cache: set data.cache to a folder")
        if cache is not None and cache_bytes < BLOCK:
            problems.append(f"data.cache_gb={cache_bytes / 2**30:.3g}: expected one block of {BLOCK} bytes or more")
        if retries < 0:
            problems.append(f"retries={retries}: expected 0 or more")
        if read_ahead < BLOCK:
            problems.append(f"read_ahead={read_ahead}: expected one block of {BLOCK} bytes or more")
        if problems:
            raise UserError("\n".join(problems))
        self._threads = threads
        self._fetchers = min(threads, read_ahead // BLOCK)
        self._whole = access == "shards"
        self._remote = Remote(retries=retries)
        self._cache = Cache(Path(cache) / "blocks", max_bytes=cache_bytes) if cache is not None else None
        self._indexes = Cache(Path(cache) / "indexes", max_bytes=None) if cache is not None else None
        self._stats: dict[str, Stat] = {}
        self._start()

    def _start(self) -> None:
        """Begin with nothing open: in a new object, in one that was pickled, after a fork."""
        self._process = os.getpid()
        self._files = OpenFiles()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        """Leave open files, threads and locks behind."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_process", "_files", "_pools", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Begin with nothing open."""
        self.__dict__.update(state)
        self._start()

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, requests: Sequence[Request]) -> list[bytes | DataFault]:
        """Return the bytes of each request in the order asked, fewer where a file ends; DataFault unreadable where reading fails for good.

        Raises: UserError for a store that cannot be read in the way that is set.
        """
        if self._process != os.getpid():
            self._start()
        order = sorted(range(len(requests)), key=lambda number: (requests[number].path, requests[number].offset))
        found: list[bytes | DataFault] = [b""] * len(requests)
        local: list[tuple[int, File]] = []
        remote: list[int] = []
        path, file = None, None
        for number in order:
            if requests[number].path != path:
                path = requests[number].path
                file = None if is_remote(path) else self._files.local(path)
            if isinstance(file, File):
                local.append((number, file))
            elif file is None:
                remote.append(number)
            else:
                found[number] = file
        pieces = [(file, requests[number].offset, requests[number].size) for number, file in local]
        for (number, _), blob in zip(local, read_pieces(pieces, threads=self._threads, threaded=lambda: self._pool().map), strict=True):
            found[number] = blob if isinstance(blob, bytes) else DataFault(blob.reason, f"{requests[number].path}: {blob.detail}")
        if remote:
            self._read_remote(requests, remote, found)
        return found

    def _read_remote(self, requests: Sequence[Request], order: Sequence[int], found: list[bytes | DataFault]) -> None:
        """Fill in the answers of remote requests, `order` being their numbers sorted by place."""
        if self._cache is None:
            spans = neighbours(requests, order)
        else:
            faults = self._look_up({requests[number].path for number in order})
            for number in order:
                found[number] = faults.get(requests[number].path, b"")
            spans = blocks(
                requests, [number for number in order if requests[number].path not in faults], stats=self._stats, whole=self._whole
            )
        for span, blobs in zip(spans, self._pool(self._fetchers).map(self._fetch, spans), strict=True):
            for (number, _, _), blob in zip(span.pieces, blobs, strict=True):
                if isinstance(found[number], bytes):  # a piece behind one that failed changes nothing
                    found[number] = blob if isinstance(blob, DataFault) else found[number] + blob

    def _look_up(self, paths: set[str]) -> dict[str, DataFault]:
        """Ask for the sizes of objects not met before; return what could not be found."""

        def ask(path: str) -> DataFault | None:
            try:
                self._stats[path] = self._remote.stat(path)
            except FileNotFoundError:
                return DataFault("unreadable", f"{discreet(path)}: not found")
            except DataFault as fault:
                return fault
            return None

        new = sorted(paths - self._stats.keys())
        return {path: fault for path, fault in zip(new, self._pool(self._fetchers).map(ask, new), strict=True) if fault}

    def _fetch(self, span: Span) -> list[bytes | DataFault]:
        """Return the pieces of a span, or the same fault for each."""
        try:
            if span.block and (file := self._cached(span)):
                return [file.read(start - span.start, stop - start) for _, start, stop in span.pieces]
            data = self._remote.read(span.path, span.start, span.stop)
            return [data[start - span.start : stop - span.start] for _, start, stop in span.pieces]
        except FileNotFoundError:
            return [DataFault("unreadable", f"{discreet(span.path)}: not found")] * len(span.pieces)
        except DataFault as fault:
            return [fault] * len(span.pieces)

    def _cached(self, span: Span) -> File | None:
        """Open the block of a span, fetched when it is not there; None when the cache fails and ranges can be read without it."""
        if (cache := self._cache) is None:
            return None
        try:
            return self._files.get(
                span.block, lambda: cache.open(span.block, span.stop - span.start, lambda part: self._download(span, part))
            )
        except OSError as error:
            if self._whole:
                raise DataFault("unreadable", f"{discreet(span.path)}: data.cache={cache.folder}: {error.strerror or error}") from None
            log.warning("data.cache=%s: %s; this process goes on without it", cache.folder, error.strerror or error)
            self._cache = None
            return None

    def _download(self, span: Span, part: Path) -> None:
        """Write the bytes of a span, a block at a time or in one sequential read. Raises: DataFault unreadable; OSError of the file."""
        try:
            if self._whole:
                self._remote.download(span.path, part, size=span.stop)
                return
            with part.open("wb") as file:
                for start in range(span.start, span.stop, BLOCK):
                    file.write(self._remote.read(span.path, start, min(start + BLOCK, span.stop)))
        except FileNotFoundError:
            raise DataFault("unreadable", f"{discreet(span.path)}: not found") from None

    def _pool(self, threads: int | None = None) -> ThreadPoolExecutor:
        """Return this process's threads, made when first needed."""
        threads = threads or self._threads
        with self._lock:
            if threads not in self._pools:
                self._pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="infimed-store")
            return self._pools[threads]

    # --- finding -----------------------------------------------------------------------------------------------------

    def list(self, path: str) -> list[str]:
        """Return the tars behind a file, folder or pattern, sorted; none when there is none.

        Raises: UserError for what is no place to read from, and for a store that does not answer.
        """
        if path.startswith("pipe:") or ("::" in path and "://" in path):
            raise UserError(f"{discreet(path)}: commands and chained URLs are not run; give a file, a folder, a pattern or one URL")
        if not is_remote(path):
            return _list_local(path)
        with suppress(FileNotFoundError), _answering():
            found = self._remote.list(path)
            self._stats |= {url: stat for url, stat in found.items() if stat is not None}
            return [*found]
        return []

    def exists(self, path: str) -> bool:
        """Say whether a file is there. Raises: UserError for a store that does not answer."""
        if not is_remote(path):
            return os.path.exists(path)
        with suppress(FileNotFoundError), _answering():
            self._stats[path] = self._remote.stat(path)
            return True
        return False

    def size(self, path: str) -> int:
        """Return the bytes of a file. Raises: UserError when it cannot be had."""
        try:
            if not is_remote(path):
                return os.path.getsize(path)
            with _answering():
                self._stats[path] = stat = self._stats.get(path) or self._remote.stat(path)
                return stat.size
        except OSError as error:
            raise UserError(f"{discreet(path)}: {error.strerror or 'not found'}") from None

    def fetch(self, path: str) -> Path:
        """Return a whole small file (an index) as a local one; a remote one is fetched again when its size or version changed.

        Raises: UserError when it cannot be had.
        """
        if not is_remote(path):
            return Path(path)
        folder = self._index_folder()
        try:
            with _answering():
                stat = self._stats.pop(path, None) or self._remote.stat(path)  # what a listing just told is new enough once
                whole = Span(path, 0, stat.size, block_name(path, stat, "file"))
                os.close(folder.open(whole.block, stat.size, lambda part: self._download(whole, part)))
        except OSError as error:
            raise UserError(f"{discreet(path)}: {error.strerror or 'not found'}") from None
        return folder.path(whole.block)

    def _index_folder(self) -> Cache:
        """Return where fetched files lie: beside the cache's blocks, or in a folder that goes when this process ends."""
        if self._indexes is None:
            folder = tempfile.mkdtemp(prefix="infimed-")
            atexit.register(_remove, folder, process=os.getpid())
            self._indexes = Cache(folder, max_bytes=None)
        return self._indexes


def _list_local(path: str) -> list[str]:
    found = sorted(Path(path).glob("*.tar")) if os.path.isdir(path) else sorted(map(Path, glob.glob(path)))
    if not found and os.path.isfile(path):  # a real name that happens to hold glob characters
        found = [Path(path)]
    return [str(tar) for tar in found]


def _remove(folder: str, *, process: int) -> None:
    if os.getpid() == process:  # not what a fork of its maker leaves
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _answering() -> Iterator[None]:
    """Turn a store that does not answer into a mistake that the user can mend."""
    try:
        yield
    except DataFault as fault:
        raise UserError(f"{fault.detail}; check the address, the credentials and the network") from None
