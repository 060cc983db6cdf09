"""Check shards, or write their index again.

python tools/check_shards.py samples/train              # every problem on a line; exit 1 when there is any
python tools/check_shards.py --reindex other/*.tar      # index WebDataset tars made elsewhere, or after a deliberate change
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infimed.contracts import UserError
from infimed.data.shards import find_tars, reindex, verify
from infimed.processing.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when all is sound, 1 when a shard has problems, 2 for a mistake on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a .tar, a folder or a quoted pattern")
    parser.add_argument("--reindex", action="store_true", help="write the index of each tar again from its content")
    parser.add_argument("--tokenizer", help="with --reindex: count the text now; otherwise it is counted at every start")
    args = parser.parse_args(argv)
    problems: list[str] = []
    tars = find_tars(args.paths, problems)
    try:
        tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for tar in tars:
        if args.reindex:
            problems += _reindex(tar, tokenizer)
        else:
            problems += verify(tar)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{len(tars)} shards {'indexed' if args.reindex else 'sound'}")
    return 1 if problems else 0


def _reindex(tar: Path, tokenizer: Tokenizer | None) -> list[str]:
    """Index one tar and return its problems."""
    try:
        reindex(tar, tokenizer=tokenizer)
    except UserError as error:
        return str(error).splitlines()
    return []


if __name__ == "__main__":
    sys.exit(main())
