"""Objects behind URLs (s3://, gs://, http(s)://, memory://, file:// ...) through fsspec: ranges, sizes, listings; patient and discreet.

Where a store lives beside its URL (endpoint, region, profile) is fsspec's own configuration: `FSSPEC_S3_ENDPOINT_URL`, `~/.config/fsspec/`.
A URL may carry a password or a signature: what is said of one goes through `discreet` first, and no cause is chained that could repeat it.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import TypeVar
from urllib.parse import urlsplit

import fsspec

from infimed.contracts import DataFault, UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK = 4 * 2**20  # bytes of one ranged read at most: long enough that a store's latency is little beside the transfer
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CLIENTS = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "urllib3", "http", "azure", "huggingface_hub", "httpx"}
_RETRIED = {408, 425, 429}  # of the statuses 4xx: time-outs and requests to slow down
_VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created")
_PROGRAMS = {"http": "curl", "https": "curl", "hf": "curl", "gs": "gsutil"}  # what webdataset's opener runs for a scheme
_LONGEST_WAIT = 30.0  # seconds
_jitter = random.SystemRandom()  # neither moves the seeded generators nor repeats itself in forked workers


def is_remote(path: str) -> bool:
    """Say whether a path is a URL."""
    return _URL.match(path) is not None


def discreet(text: str) -> str:
    """Return a URL, or a text that holds some, without what may be secret: user, password and query."""
    return re.sub(r"(://[^\s?'\")]*)\?[^\s'\")]*", r"\1", re.sub(r"://[^/\s?'\"]*@", "://", text))


def parted(path: str) -> tuple[str, str, str]:
    """Cut a path or URL into its folder, the name of its file and, of a web address, the query behind: a signature, often."""
    place, mark, query = path.partition("?") if path.startswith("http") and is_remote(path) else (path, "", "")
    folder, slash, name = place.rpartition("/")
    return folder + slash, name, mark + query


@dataclass(frozen=True)
class Stat:
    """What a store says of an object."""

    size: int  # bytes
    version: str  # changes when the object does (ETag, time of change); empty where the store has none


@dataclass(frozen=True)
class Remote:
    """A patient client of any store that fsspec knows. Every failure is final when it gets out of here."""

    retries: int

    def stat(self, path: str) -> Stat:
        """Ask for size and version. Raises: FileNotFoundError; DataFault unreadable."""
        return self._patiently(lambda: _stat(_fresh(path)[0].info(_name(path)), path), path)

    def list(self, path: str) -> dict[str, Stat | None]:
        """Return the tars of a folder, what matches a pattern, or the one file, sorted by URL, with what the listing tells of each.

        Raises: FileNotFoundError for a folder or file that is not there; DataFault unreadable.
        """
        bare = urlsplit(path).path if path.startswith("http") else path  # the ? of a web address begins its query
        if any(magic in bare for magic in ("*[" if path.startswith("http") else "*[?")):
            found = self._patiently(lambda: list(_fresh(path)[0].glob(_name(path), detail=True).values()), path)
            found = [info for info in found if info.get("type") == "file"]
        elif bare.endswith(".tar"):
            return {path: self.stat(path)}
        else:
            found = self._patiently(lambda: _fresh(path)[0].ls(_name(path), detail=True), path)
            found = [info for info in found if urlsplit(info["name"]).path.endswith(".tar")]
        urls = {_filesystem(path)[0].unstrip_protocol(info["name"]): info for info in found}
        return {url: _stat(info, url) if info.get("size") is not None else None for url, info in sorted(urls.items())}

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), fewer only where the object ends.

        Raises: FileNotFoundError; DataFault unreadable; UserError for a store that has no ranges.
        """

        def once() -> bytes:
            filesystem, name = _filesystem(path)
            try:
                data = filesystem.cat_file(name, start=start, end=stop)
            except Exception as error:
                if (_status(error) == 416 or getattr(error, "errno", None) == errno.EINVAL) and start >= self.stat(path).size:
                    return b""  # some stores call a range behind the end an error
                raise
            end = start + len(data)
            size = self.stat(path).size if end < stop else stop  # one that answers with less than asked must have come to its end
            if len(data) > stop - start or end > max(size, start):
                raise UserError(f"{discreet(path)} answers a request for a range with all of it; set data.access=shards (and data.cache)")
            if end < min(stop, size):
                raise ConnectionError(f"{len(data)} of {min(stop, size) - start} bytes came")
            return data

        return self._patiently(once, path)

    def download(self, path: str, target: Path, *, size: int) -> None:
        """Write a whole object in one sequential read: by webdataset's opener where its program is installed, else by fsspec.

        Raises: FileNotFoundError; DataFault unreadable.
        """

        def once() -> None:
            scheme = urlsplit(path).scheme
            if shutil.which(_PROGRAMS.get(scheme, "")) or scheme == "file":
                from webdataset.gopen import gopen  # here, because it imports torch and more

                with gopen(path, "rb") as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, BLOCK)
            else:
                filesystem, name = _filesystem(path)
                filesystem.get_file(name, str(target))
            if target.stat().st_size != size:
                raise ConnectionError(f"{target.stat().st_size} of {size} bytes came")

        self._patiently(once, path)

    def _patiently(self, action: Callable[[], T], path: str) -> T:
        """Try until it works, waiting longer each time; what is no matter of the network passes through.

        Raises: FileNotFoundError when there is no such object; DataFault unreadable when the answer is final or the retries are spent.
        """
        for attempt in range(self.retries + 1):
            try:
                return action()
            except Exception as failure:
                error = failure.__cause__ if isinstance(failure, FileNotFoundError) and failure.__cause__ else failure  # fsspec's disguise
                if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _CLIENTS:
                    raise
                if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
                    raise FileNotFoundError(discreet(path)) from None
                said = f"{discreet(path)}: {type(error).__name__}: {discreet(str(error))}"
                if _final(error) or attempt == self.retries:
                    raise DataFault("unreadable", said if _final(error) else f"{said} ({self.retries} retries)") from None
            wait = min(_LONGEST_WAIT, 0.5 * 2**attempt) * _jitter.uniform(0.5, 1)
            log.info("%s; again in %.1f s", said, wait)
            sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def _filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return fsspec's client for a URL (made anew in a forked process) and the name it knows the object by."""
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise UserError(f"{discreet(path)}: {error}: pip install 'infimed[remote]'") from None
    except ValueError as error:
        raise UserError(f"{discreet(path)}: {error}; known are s3://, gs://, https:// and what else fsspec has installed") from None


def _fresh(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    filesystem, name = _filesystem(path)
    filesystem.invalidate_cache()
    return filesystem, name


def _name(path: str) -> str:
    return _filesystem(path)[1]


def _stat(info: Mapping[str, object], path: str) -> Stat:
    if info.get("type") == "directory":
        raise FileNotFoundError(path)
    if not isinstance(size := info.get("size"), int):
        raise DataFault("unreadable", f"{discreet(path)}: the store does not say how long it is")
    return Stat(size, next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), ""))


def _status(error: BaseException) -> int | None:
    """Find the HTTP status of a client's error, whatever the client calls it."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((int(value) for value in found if str(value).isdecimal()), None)


def _final(error: BaseException) -> bool:
    """Say whether asking again cannot help: forbidden, malformed, without credentials."""
    if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)) or "Credentials" in type(error).__name__:
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in _RETRIED
