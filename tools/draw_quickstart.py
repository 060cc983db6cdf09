"""Draw the README's figure from a finished quickstart: held-out pictures with answers, the loss of each stage, what was learned.

python tools/draw_quickstart.py logs/quickstart/DATE_TIME docs/quickstart.png
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from infimed.data.shards import open_shards
from infimed.evaluation.runner import Prediction, read_predictions
from infimed.processing.dicom import read_image_file

INK, RIGHT, WRONG, BLUE, GREY, ORANGE = "#222222", "#1a7f37", "#b42318", "#2563a8", "#9aa5b1", "#d9822b"


def main() -> None:
    """Read a run folder, write one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", default="samples/test")
    args = parser.parse_args()
    figure = plt.figure(figsize=(13, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.35, 1])
    draw_pictures(top, args.run, args.shards)
    losses, families = bottom.subplots(1, 2, width_ratios=[1, 1.4])
    draw_losses(losses, args.run)
    draw_families(families, args.run)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=90)


def draw_pictures(figure: SubFigure, run: Path, shards_path: str, *, count: int = 12) -> None:
    """Show one question of each kind, the first of its family with a picture, right or wrong as it came."""
    shards = open_shards([shards_path])
    row_of = {row.key: i for i, row in enumerate(shards.rows)}
    chosen: dict[tuple[str, str], Prediction] = {}
    for prediction in read_predictions(run / "evaluation" / "model" / "predictions.jsonl"):
        if len(shards.rows[row_of[prediction.id]].image_sizes) == 1:
            chosen.setdefault((prediction.groups["domain"], prediction.groups["task"]), prediction)
    for axis, prediction in zip(figure.subplots(2, count // 2).flat, list(chosen.values())[:count], strict=False):
        sample, images = shards.read(row_of[prediction.id])
        axis.imshow(read_image_file(images[0]).permute(1, 2, 0))
        question = " ".join(sample.messages[0].text.replace("<image>", "").split("\n"))
        axis.set_title(textwrap.fill(question, 34), fontsize=6.5, color=INK)
        mark = RIGHT if prediction.correct else WRONG
        axis.set_xlabel(f"reference: {prediction.gold}   answer: {prediction.response}", fontsize=7, color=mark)
        axis.set_xticks([])
        axis.set_yticks([])


def draw_losses(axis: Axes, run: Path) -> None:
    """Draw the training loss of the stages one after the other."""
    start = 0
    for path in sorted(run.glob("[0-9]*_*/steps.jsonl")):
        losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        smooth = [sum(losses[max(0, i - 9) : i + 1]) / len(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
        axis.plot(range(start, start + len(losses)), smooth, linewidth=1.2, label=path.parent.name[2:])
        start += len(losses)
    axis.set(title="training loss, mean a supervised token", xlabel="optimizer step", yscale="log")
    axis.legend(fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def draw_families(axis: Axes, run: Path) -> None:
    """Draw accuracy with its interval beside the two baselines, a family a row; a filled mark is learned."""
    rows = [row for row in json.loads((run / "evaluation" / "table.json").read_text())["rows"] if row["grouping"] == "domain x task"]
    for y, row in enumerate(reversed(rows)):
        accuracy = row["accuracy"]
        low, high = accuracy["low"], accuracy["high"]
        axis.plot([100 * low, 100 * high], [y, y], color=BLUE, linewidth=1.4)
        axis.plot(100 * accuracy["mean"], y, "o", color=BLUE, markersize=6, fillstyle="full" if row["learned"] == "yes" else "none")
        axis.plot(100 * row["majority"], y, "|", color=ORANGE, markersize=10, markeredgewidth=2)
        axis.plot(100 * row["blind"], y, "|", color=GREY, markersize=10, markeredgewidth=2)
    axis.plot([], [], "o", color=BLUE, label="accuracy (filled: learned)")
    axis.plot([], [], "|", color=ORANGE, markersize=10, markeredgewidth=2, label="majority answer")
    axis.plot([], [], "|", color=GREY, markersize=10, markeredgewidth=2, label="blind (grey pictures)")
    axis.set_yticks(range(len(rows)), [row["group"] for row in reversed(rows)], fontsize=7)
    axis.set(title="held-out questions by family, %", xlim=(0, 101))
    axis.legend(fontsize=7, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
