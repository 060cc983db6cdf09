"""JSON lines of the GPU benchmark -> Markdown tables, and the targets beside what was measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from infimed.processing.flops import peak_tflops

Line = dict
NOT_MEASURED = "not measured"

COLUMNS: dict[str, Callable[[Line], str]] = {
    "ms a step (IQR)": lambda x: f"{x['step_ms']:,.1f} ({x['iqr_ms']:,.1f})",
    "steps": lambda x: str(x["steps"]),
    "real tok/s": lambda x: f"{x['tokens_s']:,.0f}",
    "supervised tok/s": lambda x: f"{x['supervised_s']:,.0f}",
    "img/s": lambda x: f"{x['images_s']:,.0f}",
    "pad": lambda x: f"{x['pad']:.1%}",
    "peak GiB (reserved)": lambda x: f"{x['peak_gib']:.1f} ({x['reserved_gib']:.1f})",
    "micro": lambda x: str(x["micro_batches"]),
    "recompiles": lambda x: str(x["recompiles"]),
    "syncs": lambda x: f"{x['syncs']:g}",
    "launches": lambda x: f"{x['launches']:,.0f}",
    "busy": lambda x: f"{x['gpu_busy']:.0%}",
    "loss": lambda x: f"{x['loss']:.4f}",
    "attention": lambda x: x["attention"],
    "precision": lambda x: x["precision"],
}
"""Columns of the training table; what a line lacks was not measured."""


def read(path: Path) -> list[Line]:
    """Read the lines, the last one of each case."""
    lines = [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")] if path.exists() else []
    return list({key(line): line for line in lines}.values())


def key(line: Line) -> str:
    """Say which case under which settings a line is about."""
    return json.dumps([line.get(name) for name in ("section", "model", "stage", "case", "round", "settings")], sort_keys=True)


def report(lines: Sequence[Line], header: str, left_out: Sequence[str]) -> str:
    """Draw all tables."""
    parts = [header]
    measured = [x for x in lines if x["status"] == "measured"]
    for section in ("ceilings", "attention", "loss"):
        if mine := [x for x in measured if x["section"] == section]:
            parts.append(f"### {section}\n\n{_plain_table(mine)}")
    for model, stage in dict.fromkeys((x["model"], x["stage"]) for x in measured if x["section"] == "train"):
        parts.append(f"### {model} {stage}\n\n{_training_table(measured, model, stage)}")
    parts += [f"DISAGREE: {text}" for text in disagreements(lines)]
    for status in ("skipped", "failed"):
        if mine := [x for x in lines if x["status"] == status]:
            parts.append("\n".join(f"{status}: {_label(x)}: {x['reason']}" for x in mine))
    if left_out:
        parts.append(f"{NOT_MEASURED}, for the budget: " + ", ".join(left_out))
    parts.append(f"### targets\n\n{_targets(measured)}")
    if not measured:
        parts.append("nothing was measured")
    return "\n\n".join(["", *parts])


def disagreements(lines: Sequence[Line]) -> list[str]:
    """Compare the first losses of the cases of a stage: the same weights and samples, so the same number. B1 leaks across documents."""
    found = []
    train = [x for x in lines if x["section"] == "train" and x["status"] == "measured" and x["case"] not in ("B1", "O3")]
    for line in train:
        first = next(x for x in train if (x["model"], x["stage"]) == (line["model"], line["stage"]))
        tolerance = 1e-3 if line["settings"]["precision"] == "fp32" else 2e-2
        if not abs(line["loss"] - first["loss"]) <= tolerance:
            found.append(f"{_label(line)}: loss {line['loss']:.5f}, {first['case']} has {first['loss']:.5f}")
    return found


def _label(line: Line) -> str:
    return " ".join(str(line[name]) for name in ("section", "model", "stage", "case") if name in line)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def _plain_table(lines: Sequence[Line]) -> str:
    columns = [k for k in dict.fromkeys(k for x in lines for k in x) if any(isinstance(x.get(k), float) for x in lines) and k != "wall_s"]
    return _table(["case", *columns], [[x["case"], *(f"{x[c]:.4g}" if c in x else NOT_MEASURED for c in columns)] for x in lines])


def _training_table(lines: Sequence[Line], model: str, stage: str) -> str:
    """Draw a stage; a case that ran twice has two rows. MFU: of the datasheet, of the large product, of the model's own products."""
    rows = []
    mine = [x for x in lines if (x.get("model"), x.get("stage")) == (model, stage)]
    base = next((x["tokens_s"] for x in mine if x["case"] == "B0"), None)
    for line in sorted(mine, key=lambda x: (x["case"], x["round"])):
        shares = [_share(line["tflops"], peak) for peak in _peaks(lines, model)]
        cells = []
        for column in COLUMNS.values():
            try:
                cells.append(column(line))
            except KeyError:
                cells.append(NOT_MEASURED)
        ratio = f"{line['tokens_s'] / base:.2f}" if base else NOT_MEASURED
        rows.append([line["case"], ratio, " / ".join(shares), *cells])
    drift = ""
    if twice := [x for x in mine if x["round"] == 2]:
        first = next(x for x in mine if x["case"] == twice[0]["case"] and x["round"] == 1)
        drift = f"\n\ndrift of {first['case']}, second over first time: {twice[0]['step_ms'] / first['step_ms']:.3f}"
    work = f"{mine[0]['tflop']:.4g} TFLOP a step"
    return f"{work}\n\n" + _table(["case", "x B0", "MFU sheet / C_mm / C_shape", *COLUMNS], rows) + drift


def _peaks(lines: Sequence[Line], model: str) -> list[float | None]:
    """Return the TFLOP/s of the datasheet, of the large product and of the model's products; None: unknown."""
    ceilings = {x["case"]: x.get("tflops") for x in lines if x["section"] == "ceilings"}
    large = next((rate for case, rate in ceilings.items() if case.endswith("bfloat16")), None)
    sheet = next((peak_tflops(x["settings"]["device"]) for x in lines), None)
    return [sheet, large, ceilings.get(f"products of {model}") if sheet else None]


def _share(rate: float, peak: float | None) -> str:
    return f"{rate / peak:.1%}" if peak else NOT_MEASURED


def _targets(lines: Sequence[Line]) -> str:
    """Put the issue's targets beside what was measured through Lightning (O2); a CPU's figures are none."""
    train = [x for x in lines if x["section"] == "train" and peak_tflops(x["settings"]["device"])]

    def value(model: str, stage: str, case: str, field: str) -> float | None:
        found = [x[field] for x in train if (x["model"], x["stage"], x["case"]) == (model, stage, case) and field in x]
        return statistics.median(found) if found else None

    rows = []
    for model, stage, least in (("4b", "text", 0.58), ("1.7b", "text", 0.54), ("4b", "s2", 0.55), ("1.7b", "s2", 0.45)):
        rate = value(model, stage, "O2", "tflops")
        sheet = peak_tflops(train[0]["settings"]["device"]) if train else None
        rows.append([f"{model} {stage}: honest MFU of 989", f">= {least:.0%}", _share(rate, sheet) if rate else NOT_MEASURED])
    for model, stage in dict.fromkeys((x["model"], x["stage"]) for x in train) or [("each model", "each stage")]:
        fast = value(model, stage, "O2", "tokens_s")
        against = {"B0": 5, "B1": 4, "B2": 1.5, "B2gc": 1.5, "B3": 1.05 if stage == "text" else 1.2, "O1": 0.99}
        for case, least in against.items():
            slow = value(model, stage, case, "tokens_s")
            rows.append(
                [f"{model} {stage}: O2 / {case}, real tok/s", f">= {least}", f"{fast / slow:.2f}" if fast and slow else NOT_MEASURED]
            )
        peak, padded = value(model, stage, "O2", "peak_gib"), value(model, stage, "B0", "peak_gib")
        split = value(model, stage, "B0", "micro_batches")
        note = f" (B0 in {split:.0f} micro-batches)" if split and split > 1 else ""
        rows.append([f"{model} {stage}: peak of O2 / B0", "<= 40%", f"{peak / padded:.0%}{note}" if peak and padded else NOT_MEASURED])
        for field in ("recompiles", "syncs"):
            found = value(model, stage, "O2", field)
            rows.append([f"{model} {stage}: {field} of O2", "0", NOT_MEASURED if found is None else f"{found:g}"])
    return _table(["target", "wanted", "measured"], rows)
