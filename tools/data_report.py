"""Report what each stage would be fed, before any training: lengths, picture sizes, how rows fill, steps, tokens, FLOPs.

python tools/data_report.py experiment=quickstart [KEY=VALUE ...] [--world-size W] [--html report.html] [--json]

No pixel is read and no weight is built; a few samples of each source are read for their text, to see how much of it is learned from.
--html writes a page and --json prints numbers alone; without either it is a text for the terminal. Plans are carried out over at most
200,000 samples; what lies beyond is extrapolated, and said to be.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from infimed import preview
from infimed.config import Stage
from infimed.data.survey_page import html, text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits 2 on a mistake of the user."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for infimed.train")
    parser.add_argument("--world-size", type=int, default=1, help="ranks, for the micro-steps")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page instead")
    parser.add_argument("--json", action="store_true", help="print numbers instead, a list with one entry a stage")
    args = parser.parse_intermixed_args(argv)
    preview.run(lambda chain: report(chain, args), args.overrides)


def report(chain: list[Stage], args: Namespace) -> None:
    """Survey every stage, then print or write."""
    surveys = [preview.survey_stage(stage, world_size=args.world_size) for stage in chain]
    if args.html is not None:
        preview.write(html(surveys, "Data report"), args.html)
        print(f"{args.html}: {len(surveys)} stages")
    elif args.json:
        print(json.dumps([asdict(survey) for survey in surveys], indent=1))
    else:
        print("\n".join(text(survey) for survey in surveys))


if __name__ == "__main__":
    main()
