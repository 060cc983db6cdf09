"""Many small shards into few big ones, and the indexes of a folder into one: bytes are copied, nothing is decoded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from infimed.contracts import DataFault, UserError
from infimed.data.index import MERGED, Columns, fix_of, index_of
from infimed.data.index_writer import save_index
from infimed.data.shard_open import Shard, open_all, read_own_header
from infimed.data.shard_writer import ShardWriter
from infimed.data.shards import ShardSet
from infimed.data.store import Store, discreet

Progress = Callable[[Iterable[int]], Iterable[int]]


def merge_shards(
    paths: Sequence[str | Path],
    out: Path,
    *,
    max_samples: int,
    prefix: str = "shard",
    prefix_keys: bool = False,
    progress: Progress = iter,
) -> list[Path]:
    """Copy samples, in the order of `paths`, into tars of at most `max_samples`, and their rows into the new indexes.

    Members that belong to no sample are left behind; tars of different layouts do not share one. prefix_keys: put the name of the
    folder that a shard lies in before its keys. Equal input gives equal bytes. progress: wraps the numbers of the shards.
    Raises: UserError for a key that comes twice, damaged bytes, or text counted with different tokenizers; nothing is left half written.
    """
    store = Store()
    shards = ShardSet(open_all(paths, store), store)
    tokenizer = _one_tokenizer(shards.shards)
    before = [_key_prefix(shard.path) if prefix_keys else "" for shard in shards.shards]
    _check_keys(shards, before)
    with ShardWriter(out, prefix=prefix, max_samples=max_samples, tokenizer=tokenizer) as writer:
        for number in progress(range(len(shards.shards))):
            layout = shards.shards[number].tar.layout
            for row in shards.rows_of(number)[0].tolist():
                facts, (found,) = shards.rows[row], shards.read_raw([row])
                if isinstance(found, DataFault):
                    raise UserError(f"{discreet(facts.shard)}: {found}; check it with tools/check_shards.py, and copy it again")
                key = before[number] + facts.key
                members = writer.add(key, zip([member.name for member in facts.members], found, strict=True), layout=layout)
                writer.note(replace(facts, key=key, members=members))
    return writer.paths


def merge_indexes(folder: Path) -> Path:
    """Write the one index that describes all tars of a folder. Raises: UserError."""
    store = Store()
    if not (tars := store.list(str(folder))):
        raise UserError(f"{folder}: no folder that holds any .tar; name the folder of some shards")
    if all(os.path.exists(index_of(tar)) for tar in tars):  # else those that are missing may be in the merged one that there is
        shards = [Shard(tar, read_own_header(tar, store), 0) for tar in tars]
    else:
        shards = open_all([folder], store)
    for shard in shards:
        if (size := store.size(shard.path)) != shard.tar.bytes:
            raise UserError(f"{shard.path}: {size} bytes, its index expects {shard.tar.bytes}; copy it again, or index it again")
    tokenizer = _one_tokenizer(shards)
    files = {shard.header.path: shard.header for shard in shards}
    columns = {path: Columns(header, mapped=False) for path, header in files.items()}  # ten thousand mappings are more than one may have
    parts = [(shard.tar, columns[shard.header.path].part(shard.slot)) for shard in shards]
    save_index(folder / MERGED, parts, tokenizer=tokenizer)
    return folder / MERGED


def _one_tokenizer(shards: Sequence[Shard]) -> str:
    """Return the fingerprint of the tokenizer that counted all of the shards."""
    by_tokenizer = {shard.header.tokenizer: shard for shard in shards}
    if len(by_tokenizer) > 1:
        which = ", ".join(f"{name or 'none'} ({discreet(shard.path)})" for name, shard in sorted(by_tokenizer.items()))
        shard = shards[0]
        fix = fix_of(discreet(index_of(shard.path)), shard.tar.name).replace("--reindex", "--tokenizer TOKENIZER --reindex")
        raise UserError(f"their text was counted with different tokenizers: {which}; index all of them with one first: {fix} ...")
    return next(iter(by_tokenizer))


def _key_prefix(tar: str) -> str:
    folder = os.path.basename(os.path.dirname(os.path.abspath(tar)))
    return re.sub(r"[^A-Za-z0-9_-]+", "_", folder).strip("_") + "/"


def _check_keys(shards: ShardSet, before: Sequence[str]) -> None:
    """Refuse keys that come twice; eight bytes a sample are remembered, not its key."""
    hashes = np.empty(len(shards), dtype=np.int64)
    for number, prefix in enumerate(before):
        rows = shards.rows_of(number)[0]
        hashes[rows] = [hash(prefix + key) for key in shards.part(number).keys]
    hashes.sort()
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen = dict[str, str]()
    for number, prefix in enumerate(before) if repeated else ():
        for key in shards.part(number).keys:
            if hash(prefix + key) in repeated:
                path = discreet(shards.shards[number].path)
                if prefix + key in seen:
                    first = seen[prefix + key]
                    raise UserError(
                        f"key {prefix + key!r} comes twice, in {first} and {path}; --prefix-keys puts the folder's name before it"
                    )
                seen[prefix + key] = path
