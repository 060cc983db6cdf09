"""Merge many small shards into few big ones, or the indexes of a folder into one that opens at once.

python tools/merge_shards.py parts/a parts/b --out merged --max-samples 20000    # copies bytes and index rows, decodes nothing
python tools/merge_shards.py --index-only merged                                 # writes merged/index.safetensors
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from infimed.contracts import UserError
from infimed.data.shard_merge import merge_indexes, merge_shards


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when all was written, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="IN", help="a .tar, a folder or a quoted pattern")
    parser.add_argument("--out", type=Path, help="folder of the new shards")
    parser.add_argument("--max-samples", type=int, default=20_000, help="samples a shard")
    parser.add_argument("--prefix", default="shard", help="names are PREFIX-000000.tar, ...")
    parser.add_argument("--prefix-keys", action="store_true", help="put the name of a shard's folder before its keys")
    parser.add_argument("--index-only", type=Path, metavar="DIR", help="write DIR/index.safetensors and nothing else")
    args = parser.parse_args(argv)
    if (args.index_only is None) == (not args.paths) or (args.paths and args.out is None):
        parser.error("expected IN ... --out DIR, or --index-only DIR")
    try:
        if args.index_only is not None:
            print(f"wrote {merge_indexes(args.index_only)}")
            return 0
        paths = merge_shards(
            args.paths,
            args.out,
            max_samples=args.max_samples,
            prefix=args.prefix,
            prefix_keys=args.prefix_keys,
            progress=lambda numbers: tqdm(numbers, unit="shard", disable=None),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror}; name another folder, or free some space", file=sys.stderr)
        return 2
    print(f"{len(paths)} shards under {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
