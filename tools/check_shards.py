"""Check shards, or write their index again.

python tools/check_shards.py samples/train                                    # every problem on a line; exit 1 when there is any
python tools/check_shards.py --reindex other/*.tar --tokenizer samples/tokenizer --licence CC-BY-4.0 --source other

--reindex takes our tars and other WebDatasets: a .json with a conversation, or an image with its caption in a .txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from infimed.contracts import UserError
from infimed.data.page import printable
from infimed.data.records import Layout
from infimed.data.shards import find_tars, reindex, verify
from infimed.data.store import discreet, is_remote
from infimed.processing.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when all is sound, 1 when a shard has problems, 2 for a mistake on the command line."""
    args = _arguments(argv)
    missing = [f"{discreet(path)}: expected a path of this machine; copy the shard to it" for path in args.paths if is_remote(path)]
    problems: list[str] = []
    try:
        tars = find_tars([path for path in args.paths if not is_remote(path)], missing)
        if missing:
            raise UserError("\n".join(missing))
        tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given = {name: value for name in ("source", "licence", "prompt") if (value := getattr(args, name))}
    for tar in tqdm(tars, unit="shard", disable=None):
        try:
            problems += _reindex(Path(tar), tokenizer, given or None) if args.reindex else verify(tar)
        except OSError as error:
            problems.append(f"{error.filename or tar}: {error.strerror}; make it readable, its folder writable, or free some space")
    for problem in problems:
        print(printable(problem))
    if not problems:
        print(f"{len(tars)} shards {'indexed' if args.reindex else 'sound'}")
    return 1 if problems else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a .tar, a folder or a quoted pattern")
    parser.add_argument("--reindex", action="store_true", help="write the index of each tar again from its content")
    for_reindex = parser.add_argument_group("with --reindex")
    for_reindex.add_argument("--tokenizer", help="count the text now; otherwise it is counted at every start")
    for_reindex.add_argument("--source", help="source of records made elsewhere that name none")
    for_reindex.add_argument("--licence", help="licence of records made elsewhere that name none; one without is refused")
    for_reindex.add_argument("--prompt", help='what a caption answers (default: "Describe the image.")')
    args = parser.parse_args(argv)
    if not args.reindex and (args.tokenizer or args.source or args.licence or args.prompt):
        parser.error("--tokenizer, --source, --licence and --prompt go with --reindex")
    return args


def _reindex(tar: Path, tokenizer: Tokenizer | None, defaults: Layout | None) -> list[str]:
    """Index one tar and return its problems."""
    try:
        reindex(tar, tokenizer=tokenizer, defaults=defaults)
    except UserError as error:
        return str(error).splitlines()
    return []


if __name__ == "__main__":
    sys.exit(main())
