"""The table of an evaluation: every group beside what could be scored without looking, nothing left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from infimed.contracts import UserError
from infimed.evaluation.parsing import FAILURES
from infimed.evaluation.runner import Prediction
from infimed.evaluation.statistics import Interval, bootstrap_mean, paired_difference

GROUPINGS: Mapping[str, Callable[[Mapping[str, str]], str]] = {
    "overall": lambda groups: "all",
    "domain x task": lambda groups: f"{groups.get('domain', 'unknown')} / {groups.get('task', 'unknown')}",
    "modality": lambda groups: groups.get("modality", "unknown"),
    "answer type": lambda groups: groups.get("answer_type", "unknown"),
}
HEADINGS = ("group", "n", "clusters", "accuracy", "majority", "blind", "gain over the better", "learned", "unparsed")


@dataclass(frozen=True)
class Row:
    """One group of questions; rates are shares in [0, 1]."""

    grouping: str
    group: str
    n: int
    clusters: int
    accuracy: Interval
    majority: float
    blind: float
    baseline: Literal["majority", "blind"]  # the better of the two here
    gain: Interval  # accuracy minus that baseline's, question by question
    learned: Literal["yes", "no", "undefined"]  # yes: the whole interval of the gain lies above 0
    unparsed: float  # responses in which no answer could be read


@dataclass(frozen=True)
class Table:
    """The rows in a fixed order: groupings as listed in GROUPINGS, groups by name."""

    rows: tuple[Row, ...]
    level: float  # of the intervals, each by itself: no correction for the number of rows
    draws: int
    seed: int


def summarise(
    predictions: Sequence[Prediction],
    blind: Sequence[Prediction],
    majority: Sequence[Prediction],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Table:
    """Compare a model's predictions with the same model shown grey pictures and with the majority answer.

    Raises:
        UserError: the three do not answer the same questions.
    """
    blind, majority = _aligned(predictions, blind, "blind"), _aligned(predictions, majority, "majority")
    rows = []
    for grouping, name_of in GROUPINGS.items():
        members: dict[str, list[int]] = {}
        for i, prediction in enumerate(predictions):
            members.setdefault(name_of(prediction.groups), []).append(i)
        for group in sorted(members):
            picked = [[answers[i] for i in members[group]] for answers in (predictions, blind, majority)]
            rows.append(_row(grouping, group, *picked, draws=draws, seed=seed, level=level))
    return Table(tuple(rows), level, draws, seed)


def _aligned(predictions: Sequence[Prediction], others: Sequence[Prediction], name: str) -> list[Prediction]:
    """Put the other predictions in the order of the model's."""
    by_id = {p.id: p for p in others}
    ids = {p.id for p in predictions}
    if len(ids) < len(predictions) or len(others) != len(predictions) or ids != by_id.keys():
        raise UserError(
            f"{name}: {len(others)} predictions on {len(by_id)} questions, {len(ids & by_id.keys())} of them among the model's {len(ids)}; "
            "expected the same questions, each once; evaluate both on the same shards and limit"
        )
    return [by_id[p.id] for p in predictions]


def _row(
    grouping: str,
    group: str,
    model: Sequence[Prediction],
    blind: Sequence[Prediction],
    majority: Sequence[Prediction],
    *,
    draws: int,
    seed: int,
    level: float,
) -> Row:
    """Compute one group of at least one question."""
    clusters = [p.cluster for p in model]
    right, blindly, mostly = ([float(p.correct) for p in answers] for answers in (model, blind, majority))
    baseline = "blind" if sum(blindly) > sum(mostly) else "majority"
    accuracy = bootstrap_mean(right, clusters, draws=draws, seed=seed, level=level)
    gain = paired_difference(right, blindly if baseline == "blind" else mostly, clusters, draws=draws, seed=seed, level=level)
    n = len(model)
    return Row(
        grouping=grouping,
        group=group,
        n=n,
        clusters=accuracy.clusters,
        accuracy=accuracy,
        majority=sum(mostly) / n,
        blind=sum(blindly) / n,
        baseline=baseline,
        gain=gain,
        learned="undefined" if gain.low is None else "yes" if gain.low > 0 else "no",
        unparsed=sum(p.status in FAILURES for p in model) / n,
    )


def to_json(table: Table) -> str:
    """Write the table with every digit; equal tables give equal text."""
    return json.dumps(asdict(table), indent=1, ensure_ascii=False) + "\n"


def to_markdown(table: Table) -> str:
    """Write one Markdown table a grouping; percentages."""
    parts = []
    for grouping, lines in _cells(table).items():
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        head = [grouping, *HEADINGS[1:]]
        rule = ["---", *["---:"] * (len(HEADINGS) - 1)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *escaped)))
    return "\n\n".join([*parts, _legend(table)]) + "\n"


def format_terminal(table: Table) -> str:
    """Write the table as aligned text; percentages."""
    cells = _cells(table)
    every = [list(HEADINGS), *(line for lines in cells.values() for line in lines)]
    widths = [max(len(line[i]) for line in every) for i in range(len(HEADINGS))]

    def aligned(line: Sequence[str]) -> str:
        return "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])

    parts = [aligned(HEADINGS)]
    for grouping, lines in cells.items():
        parts += [f"-- {grouping} ".ljust(len(parts[0]), "-"), *map(aligned, lines)]
    return "\n".join([*parts, "", _legend(table)]) + "\n"


def _cells(table: Table) -> dict[str, list[list[str]]]:
    """Format the rows, by grouping."""
    cells: dict[str, list[list[str]]] = {}
    for r in table.rows:
        line = [r.group, str(r.n), str(r.clusters), _limits(r.accuracy), _percent(r.majority), _percent(r.blind)]
        cells.setdefault(r.grouping, []).append([*line, _limits(r.gain, signed=True), r.learned, _percent(r.unparsed)])
    return cells


def _percent(share: float, *, signed: bool = False) -> str:
    return f"{100 * share + 0.0:{'+' if signed else ''}.1f}"


def _limits(interval: Interval, *, signed: bool = False) -> str:
    """Format a mean with its limits, a Wilson floor marked by `w`."""
    mean = _percent(interval.mean, signed=signed)
    if interval.low is None or interval.high is None:
        return f"{mean} [one cluster]"
    mark = "w" if interval.method == "wilson" else ""
    return f"{mean} [{_percent(interval.low, signed=signed)}, {_percent(interval.high, signed=signed)}]{mark}"


def _legend(table: Table) -> str:
    return (
        f"Percentages. Brackets: {100 * table.level:g} % cluster bootstrap ({table.draws} draws, seed {table.seed}), each row by itself; "
        "w: all clusters agree, Wilson interval over clusters. Gain: over the better of majority and blind, paired by question. "
        "Learned: the whole interval of the gain lies above 0. Unparsed: responses in which no answer could be read; they count as wrong."
    )
