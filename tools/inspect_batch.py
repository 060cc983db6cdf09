"""Show a batch exactly as training would see it: the row, what is learned, the pictures with their patches, who attends to whom.

python tools/inspect_batch.py experiment=quickstart [KEY=VALUE ...] [--stage NAME] [--step N] [--rank R --world-size W] [--html batch.html]

The samples themselves are shown, text and pictures: mind who looks over your shoulder where they are patients'. Nothing is logged, and
nothing is written unless --html names a file, which then holds them too. In the terminal green is learned, grey is given, cyan stands for
an image. --step counts micro-steps from 0; of a chain the first stage is shown unless --stage names another.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from infimed import preview
from infimed.config import Stage
from infimed.contracts import UserError
from infimed.data.batch_page import html
from infimed.data.picture import terminal


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits 2 on a mistake of the user."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for infimed.train")
    parser.add_argument("--stage", help="of a chain")
    parser.add_argument("--step", type=int, default=0, help="micro-step, from 0")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page instead, pictures included")
    args = parser.parse_intermixed_args(argv)
    preview.run(lambda chain: inspect(chain, args), args.overrides)


def inspect(chain: list[Stage], args: Namespace) -> None:
    """Print the batch, or write its page."""
    if args.step < 0:
        raise UserError(f"--step {args.step}: expected 0 or more")
    stage = preview.chosen(chain, args.stage)
    data = preview.open_data(stage, rank=args.rank, world_size=args.world_size)
    title = f"{stage.name}: micro-step {args.step:,}, rank {args.rank} of {args.world_size}"
    view = preview.view(data, step=args.step, title=title)
    if args.html is None:
        print(terminal(view, data.tokenizer))
        return
    page = html(view, data.tokenizer, data.resolution)
    preview.write(page, args.html)
    print(f"{args.html}: {len(view.segments)} samples, {len(page.encode()) / 1024:,.0f} KiB")


if __name__ == "__main__":
    main()
