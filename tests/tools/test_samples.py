"""The bundled samples are what their card says: intact, licensed, apart, balanced, and answered by their facts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from functools import cache
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from infimed.contracts import IMAGE_PLACEHOLDER, Sample
from infimed.data.index import index_path, read_header
from infimed.data.shards import open_shards, verify
from infimed.processing.tokenizer import QWEN3_ADDED, QWEN3_SPECIAL, Tokenizer

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
SPLITS = ("train", "val", "test")
LIMIT = 25 * 2**20  # bytes
FAMILIES = {
    "plane",
    "level",
    "modality",
    "organ",
    "facing",
    "skull",
    "same_plane",
    "order",
    "terms",
    "colour",
    "shape",
}


@cache
def read(split: str) -> tuple[tuple[Sample, tuple[bytes, ...]], ...]:
    """Read a whole split."""
    shards = open_shards([SAMPLES / split])
    return tuple(shards.read(number) for number in range(len(shards.rows)))


def answer_of(sample: Sample) -> str:
    """Return the answer in words, a letter resolved."""
    text = sample.messages[-1].text
    return sample.choices["ABCD".index(text)] if sample.answer_type == "choice" else text


def facts_of(provenance: str) -> dict[str, str]:
    """Read `#name=value;name=value` of one picture."""
    return dict(part.split("=", 1) for part in provenance.split("#", 1)[1].split(";") if "=" in part)


def truth_of(sample: Sample) -> str | None:
    """Work out the true answer of a single question from how its pictures were cut, not from the code that asked."""
    facts = [facts_of(part) for part in sample.provenance.split(" | ")]
    first, at = facts[0], float(facts[0].get("at", "nan"))
    if sample.task == "level":
        if first["plane"] == "sagittal":
            return "middle" if 0.35 < at < 0.65 else "side"
        return {"axial": ("lower", "upper"), "coronal": ("back", "front")}[first["plane"]][at > 0.5]
    if sample.task == "order":
        return "first" if at > float(facts[1]["at"]) else "second"
    words = {"US": "ultrasound", "XR": "X-ray", "fundus": "fundus photography", "fluorescence": "fluorescence microscopy"}
    return {
        "plane": lambda: first["plane"],
        "facing": lambda: "left" if first["mirrored"] == "1" else "right",
        "skull": lambda: f"{first['skull']} the skull",
        "same_plane": lambda: "yes" if first["plane"] == facts[1]["plane"] else "no",
        "modality": lambda: words.get(sample.modality, sample.modality),
        "organ": lambda: sample.organ,
        "colour": lambda: first["colour"],
        "shape": lambda: first["shape"],
    }.get(sample.task, lambda: None)()


def test_every_file_has_the_recorded_digest() -> None:
    recorded = dict(reversed(line.split("  ", 1)) for line in (SAMPLES / "SHA256SUMS").read_text().splitlines())
    present = {p.relative_to(SAMPLES).as_posix(): p for p in SAMPLES.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert set(recorded) == set(present)
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in present.items()} == recorded


def test_the_samples_stay_small() -> None:
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < LIMIT


@pytest.mark.parametrize("split", SPLITS)
def test_shards_agree_with_their_indexes(split: str) -> None:
    tars = sorted((SAMPLES / split).glob("*.tar"))
    assert tars and not [problem for tar in tars for problem in verify(tar)]


@pytest.mark.parametrize("split", SPLITS)
def test_text_was_counted_with_todays_tokenizer_and_chat_renderer(split: str) -> None:
    fingerprint = Tokenizer.load(SAMPLES / "tokenizer").fingerprint
    for tar in (SAMPLES / split).glob("*.tar"):
        assert read_header(str(index_path(tar)), tar.name).tokenizer == fingerprint, "run `python -m tools.build_samples --reindex`"


def test_no_patient_and_no_picture_is_in_two_splits() -> None:
    patients = {split: {sample.patient for sample, _ in read(split)} for split in SPLITS}
    pictures = {split: {hashlib.sha256(image).hexdigest() for _, images in read(split) for image in images} for split in SPLITS}
    files = {
        split: {p.split("#")[0] for sample, images in read(split) for p in sample.provenance.split(" | ") if images} for split in SPLITS
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not patients[one] & patients[other] and not files[one] & files[other]
        drawn = {
            image for sample, images in read(one) if sample.source == "easyvqa" for image in (hashlib.sha256(b).hexdigest() for b in images)
        }
        assert not (pictures[one] & pictures[other]) - drawn


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_says_where_it_comes_from_and_its_images_open(split: str) -> None:
    for sample, images in read(split):
        assert "unknown" not in (sample.licence, sample.provenance, sample.source, sample.task, sample.modality, sample.patient), sample.key
        assert sum(message.text.count(IMAGE_PLACEHOLDER) for message in sample.messages) == len(images) == len(sample.images), sample.key
        for image in images:
            with Image.open(BytesIO(image)) as opened:
                opened.load()
                assert min(opened.size) >= 64 and max(opened.size) <= 128, sample.key


def test_every_test_answer_follows_from_the_facts_of_its_pictures() -> None:
    checked = 0
    for sample, _ in (*read("test"), *read("val")):
        if sample.answer_type == "caption" or (truth := truth_of(sample)) is None:
            continue
        answer = answer_of(sample)
        question = sample.messages[0].text.replace("Answer yes or no.", "")
        if sample.answer_type == "yes_no" and sample.task != "same_plane":
            said = truth in question
            if sample.task == "skull":
                said = ("without" in question) == ("without" in truth)
            assert answer == ("yes" if said else "no"), sample.key
        else:
            assert answer == truth, sample.key
        checked += 1
    assert checked > 1200


def test_no_answer_is_favoured_in_the_test() -> None:
    yes, letters, truths = Counter(), defaultdict(Counter), defaultdict(Counter)
    for sample, _ in read("test"):
        group = (sample.task, sample.domain)
        if sample.answer_type == "yes_no":  # dealt evenly over both domains together, as the letters are
            yes[sample.task, sample.messages[-1].text] += 1
        elif sample.answer_type == "choice":
            letters[sample.task, len(sample.choices)][sample.messages[-1].text] += 1
        if sample.task != "terms" and sample.task != "same_plane":
            truths[group][str(truth_of(sample))] += 1
    for group in {group for group, _ in yes}:
        assert abs(yes[group, "yes"] - yes[group, "no"]) <= max(3, 0.12 * (yes[group, "yes"] + yes[group, "no"])), group
    for (group, size), counts in letters.items():
        assert max(counts.values()) <= sum(counts.values()) / size + 5, (group, counts)
    for group, counts in truths.items():
        assert max(counts.values()) <= 0.62 * sum(counts.values()), (group, counts)


def test_both_domains_and_all_families_are_there() -> None:
    tasks = defaultdict(set)
    for sample, _ in read("test"):
        tasks[sample.domain].add(sample.task)
    assert tasks["in"] >= FAMILIES and tasks["shifted"] >= {"plane", "level", "modality", "facing"}
    assert {sample.answer_type for sample, _ in read("train")} == {"yes_no", "choice", "open", "caption"}
    assert any(len(images) == 2 for _, images in read("test")) and any(not images for _, images in read("test"))


def test_the_tokenizer_has_qwen3s_tokens_and_reads_every_text_back() -> None:
    tokenizer = Tokenizer.load(SAMPLES / "tokenizer")
    assert tokenizer.vocab_size <= 4000
    added = json.loads((SAMPLES / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
    names = [token["content"] for token in added]
    assert names == [*QWEN3_SPECIAL, *QWEN3_ADDED, IMAGE_PLACEHOLDER, "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    for sample, _ in read("test")[::7]:
        text = sample.messages[0].text.replace(f"{IMAGE_PLACEHOLDER}\n", "")
        assert tokenizer.decode(tokenizer.encode(text)) == text
