"""From paths to opened shards: which tars there are, and which index describes each. Only headers are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from infimed.contracts import UserError
from infimed.data.index import MERGED, Header, Tar, fix_of, index_of, read_header
from infimed.data.remote import parted
from infimed.data.store import Store, discreet, is_remote

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar and its place in the header of its index."""

    path: str
    header: Header
    slot: int

    @property
    def tar(self) -> Tar:
        """Return what the index says of the tar as a whole."""
        return self.header.tars[self.slot]


def open_all(paths: Sequence[str | Path], store: Store) -> list[Shard]:
    """Open the shards behind files, folders and patterns. Raises: UserError with every problem of every path."""
    problems: list[str] = []
    by_folder: dict[str, list[str]] = {}
    for tar in find_tars(paths, problems, store=store):
        folder, _, query = parted(tar)
        by_folder.setdefault(folder + query, []).append(tar)
    shards = [shard for tars in by_folder.values() for shard in _open_folder(tars, store, problems)]
    if problems:
        raise UserError("\n".join(problems))
    return shards


def find_tars(paths: Sequence[str | Path], problems: list[str], *, store: Store | None = None) -> list[str]:
    """List the tars behind files, folders and patterns, each once, in a fixed order; what is missing goes to `problems`."""
    store, tars = store or Store(), dict[str, None]()
    for path in map(str, paths):
        if not (found := store.list(path)):
            problems.append(
                f"shards={discreet(path)}: no such .tar file, nor a folder or pattern that holds any; write some with tools/make_shards.py"
            )
        tars |= dict.fromkeys(found)
    return list(tars)


def read_own_header(tar: str, store: Store) -> Header:
    """Read the header of the index beside a tar. Raises: UserError when there is none, or none that can be read."""
    path, where, name = index_of(tar), discreet(index_of(tar)), parted(tar)[1]
    try:
        if not is_remote(tar):
            header = read_header(path, name)
        elif store.exists(path):
            header = read_header(str(store.fetch(path)), name, where=where)
        else:
            raise FileNotFoundError(path)
    except FileNotFoundError:
        old = f" ({name.removesuffix('.tar')}.index.json is of an older format)" if _has_old_index(tar) else ""
        raise UserError(f"{discreet(tar)}: no index beside it ({os.path.basename(where)}){old}; {fix_of(where, name)}") from None
    if len(header.tars) != 1:
        raise UserError(f"{where}: describes {len(header.tars)} tars, expected one; {fix_of(where, name)}")
    if header.tars[0].name != name:  # both were renamed
        header = replace(header, tars=(replace(header.tars[0], name=name),))
    return header


def _open_folder(tars: Sequence[str], store: Store, problems: list[str]) -> list[Shard]:
    """Open tars of one folder, by the merged index where it describes the folder as it is."""
    shards = []
    try:
        merged = _merged(tars[0], store)
    except UserError as error:
        problems.append(str(error))
        return []
    for tar in tars:
        try:
            shard = merged[parted(tar)[1]] if merged else Shard(tar, read_own_header(tar, store), 0)
            shard = Shard(tar, shard.header, shard.slot)
            if not is_remote(tar):  # there each size is a request; a short object shows when it is read
                _check_size(shard, store.size(tar))
            shards.append(shard)
        except UserError as error:
            problems.append(str(error))
    return shards


def _merged(tar: str, store: Store) -> dict[str, Shard] | None:
    """Return the shards of the merged index of a tar's folder; None when there is none, or when the tars there are others."""
    folder, _, query = parted(tar)
    path = f"{folder}{MERGED}{query}"
    if not store.exists(path):
        return None
    header = read_header(str(store.fetch(path)), "", where=discreet(path))
    there = {parted(found)[1]: found for found in store.list(folder + query or ".")}
    shards = {tar.name: Shard(there.get(tar.name, ""), header, slot) for slot, tar in enumerate(header.tars)}
    is_stale = shards.keys() != there.keys() or any(
        not is_remote(shard.path) and store.size(shard.path) != shard.tar.bytes and store.exists(index_of(shard.path))
        for shard in shards.values()
    )
    if is_stale:
        where = discreet(path)
        log.warning("%s describes other tars than those beside it and is not used; %s", where, fix_of(where, ""))
    return None if is_stale else shards


def _check_size(shard: Shard, size: int) -> None:
    """Warn of a tar that ends early, whose last samples will be quarantined. Raises: UserError for one that is too long."""
    expected = shard.tar.bytes
    if size > expected:
        fix = fix_of(shard.header.where, shard.tar.name)
        raise UserError(f"{shard.path}: the tar is longer than its index says: {size} bytes, expected {expected}; copy it again, or {fix}")
    if size < expected:
        log.warning(
            "%s ends early: %d bytes, the index expects %d; what is missing is quarantined; copy it again", shard.path, size, expected
        )


def _has_old_index(tar: str) -> bool:
    return not is_remote(tar) and os.path.exists(tar.removesuffix(".tar") + ".index.json")
