"""Which pictures and questions make the three splits."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence

from infimed.contracts import IMAGE_PLACEHOLDER, Message, Sample
from tools.samples import facts
from tools.samples.packages import PACKAGES, fetch, member
from tools.samples.picture import Picture, seeded
from tools.samples.questions import FAMILIES, LETTERS, MISSING, Asked, Balance, ask, caption, word
from tools.samples.stills import STILLS, crops
from tools.samples.volumes import PLANES, Look, Volume, cut, half_of, load

Built = tuple[Sample, tuple[bytes, ...]]
KINDS = ("open", "yes_no", "open", "choice", "open")  # three in five questions are open
# volume -> (pictures with questions, pictures with captions) in training
TRAIN = {"mni152": (1300, 900), "mean-head": (260, 200), "tensor": (90, 60), "series": (60, 60)}
OFTEN = {"plane": 0.9, "modality": 0.15, "organ": 0.12, "level_axial": 0.9, "level_coronal": 0.9, "level_sagittal": 0.9, "facing": 0.9}
COMMON = {("skull", "without the skull"): 0.35}  # as often as the rare value


def build(split: str) -> list[Built]:
    """Build every sample of a split, in a shuffled order that is always the same."""
    parts = {"train": _train, "val": _val, "test": _test}[split]
    samples = [*parts(Balance(split)), *_general(split), *_text(split)]
    seeded("order", split).shuffle(samples)
    return samples


def sample(key: str, pictures: Sequence[Picture], turns: Sequence[Asked], *, task: str, domain: str | None = None) -> Built:
    """Make a sample of pictures and turns; the placeholders stand before the first question."""
    messages = []
    for number, turn in enumerate(turns):
        images = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) if number == 0 else ""
        messages += [Message("user", images + turn.text), Message("assistant", turn.answer)]
    first = pictures[0]
    last = turns[-1]
    return Sample(
        key=key,
        messages=tuple(messages),
        images=tuple(f"{number}.{picture.extension}" for number, picture in enumerate(pictures)),
        source=first.source,
        task=task,
        modality=first.modality,
        organ=first.organ,
        answer_type=last.answer_type,
        choices=last.choices if len(turns) == 1 else (),
        patient=first.patient,
        domain=domain or first.domain,
        licence=first.licence,
        provenance=" | ".join(picture.provenance for picture in pictures),
    ), tuple(picture.data for picture in pictures)


def conversation(picture: Picture, balance: Balance, rng: random.Random, *, most: int = 4) -> list[Asked]:
    """Ask about the facts of a training picture, the plane first, since the other questions give it away."""
    families = [f for f, value in picture.facts.items() if rng.random() < OFTEN.get(f, COMMON.get((f, value), 1.0))]
    rng.shuffle(families)
    families = sorted(families, key=lambda f: ("modality", "organ", "plane").index(f) if f in ("modality", "organ", "plane") else 3)
    families = families[:most] or ["plane" if "plane" in picture.facts else "modality"]
    return [ask(f, picture.facts[f], kind=rng.choice(KINDS), balance=balance, rng=rng) for f in families]


def slice_of(volume: Volume, rng: random.Random, *, number: int, augment: bool, look: Look, domain: str = "in") -> Picture:
    """Cut a slice in the plane that is next in turn, anywhere within the volume's reach."""
    plane = volume.planes[number % len(volume.planes)]
    low, high = volume.reach[PLANES.index(plane)]
    return cut(volume, rng, plane=plane, at=rng.uniform(low, high), augment=augment, look=look, domain=domain)


def _train(balance: Balance) -> Iterator[Built]:
    """Yield the training conversations and captions of volumes and stills, and the pairs."""
    for name, (questions, captions) in TRAIN.items():
        volume = load(name)
        for number in range(questions + captions):
            rng = seeded("train", name, number)
            look = Look(rng.random() < 0.5)
            picture = slice_of(volume, rng, number=number, augment=True, look=look)
            if number < questions:
                yield sample(f"{name}-{number:05d}", [picture], conversation(picture, balance, rng), task="mixed")
            else:
                yield sample(f"{name}-caption-{number:05d}", [picture], [caption(picture, rng)], task="caption")
        if volume.level:
            yield from _pairs(volume, 90 if name == "mni152" else 20, balance, augment=True, prefix=f"{name}-pair")
    for still in (still for still in STILLS if still.split == "train"):
        for number, picture in enumerate(crops(still)):
            rng = seeded("ask", still.patient, number)
            key = f"{still.patient.replace('/', '-')}-{number:03d}"
            yield sample(f"{key}-caption", [picture], [caption(picture, rng)], task="caption")
            turns = [
                ask(f, picture.facts[f], kind=kind, balance=balance, rng=rng) for f in picture.facts for kind in rng.sample(KINDS[1:4], 2)
            ]
            yield sample(key, [picture], sorted(turns, key=lambda turn: turn.answer_type == "open"), task="mixed")


def _pairs(volume: Volume, count: int, balance: Balance, *, augment: bool, prefix: str, domain: str = "in") -> Iterator[Built]:
    """Yield questions about two slices: the same plane? which lies higher?"""
    for number in range(count):
        rng = seeded("pair", prefix, number)
        looks = [Look(mirrored=rng.random() < 0.5) for _ in range(2)]
        if number % 2 == 0:
            same = balance.deal("same_plane", ("yes", "no"))
            first = rng.choice(PLANES)
            second = first if same == "yes" else rng.choice([plane for plane in PLANES if plane != first])
            planes, places = (first, second), [rng.uniform(*volume.reach[PLANES.index(plane)]) for plane in (first, second)]
            text = rng.choice(
                (
                    "Do both pictures show the same plane?",
                    "Were both slices cut in the same plane?",
                    "Is the plane of the two pictures the same?",
                )
            )
            asked, task = Asked(f"{text} {MISSING[0]}", str(same), "yes_no"), "same_plane"
        else:
            planes, task = ("axial", "axial"), "order"
            places = [rng.uniform(0.12, 0.45), rng.uniform(0.6, 0.9)]
            higher = balance.deal("order", ("first", "second"))
            places = places[::-1] if higher == "first" else places
            asked = _ask_order(str(higher), balance, rng, kind=("choice", "yes_no")[number // 2 % 2])
        pictures = [
            cut(volume, rng, plane=p, at=at, augment=augment, look=k, domain=domain) for p, at, k in zip(planes, places, looks, strict=True)
        ]
        yield sample(f"{prefix}-{number:04d}", pictures, [asked], task=task)


def _ask_order(higher: str, balance: Balance, rng: random.Random, *, kind: str) -> Asked:
    """Ask which of two axial slices lies higher."""
    if kind == "yes_no":
        answer = balance.deal(("order", higher), ("yes", "no"))
        asked = higher if answer == "yes" else {"first": "second", "second": "first"}[higher]
        return Asked(f"Is the {asked} picture the one that lies higher in the brain? {MISSING[0]}", str(answer), "yes_no")
    options = ("first", "second") if balance.deal(("letter", higher), (0, 1)) else ("second", "first")
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    text = rng.choice(("Which picture lies higher in the brain?", "Which of the two slices is nearer to the top of the head?"))
    return Asked(f"{text}\n{lines}\n{MISSING[1]}", LETTERS[options.index(higher)], "choice", options)


def _probe(volume: Volume, family: str, count: int, balance: Balance, *, prefix: str, domain: str) -> Iterator[Built]:
    """Yield `count` single questions of one family about slices of a held-out volume, every true value equally often."""
    values = FAMILIES[family].values
    pool = tuple(PLANES) if family == "plane" else ()
    for number in range(count):
        rng = seeded("probe", prefix, domain, family, number)
        value, kind = values[number % len(values)], KINDS[number // len(values) % len(KINDS)]
        look = Look(rng.random() < 0.5)
        plane = (
            value
            if family == "plane"
            else family.removeprefix("level_")
            if family.startswith("level_")
            else PLANES[number // len(values) % len(PLANES)]
        )
        if family == "facing":
            plane, look = "sagittal", Look(mirrored=value == "left")
        low, high = volume.reach[PLANES.index(plane)]
        at = rng.uniform(low, high)
        while family.startswith("level_") and half_of(plane, at) != value:
            at = rng.uniform(low, high)
        picture = cut(volume, rng, plane=plane, at=at, augment=False, look=look, domain=domain)
        asked = ask(family, picture.facts[family], kind=kind, balance=balance, rng=rng, pool=pool)
        task = "level" if family.startswith("level_") else family
        yield sample(f"{prefix}-{family.replace('_', '-')}-{domain}-{number:04d}", [picture], [asked], task=task)


def _skull(count: int, balance: Balance) -> Iterator[Built]:
    """Yield skull questions over Colin27 with and without its skull; both kinds occur in training, hence in-domain."""
    volumes = [load("colin27-head"), load("colin27")]
    for number in range(count):
        rng = seeded("skull", number)
        picture = slice_of(volumes[number % 2], rng, number=number // 2, augment=False, look=Look(rng.random() < 0.5))
        asked = ask("skull", picture.facts["skull"], kind=KINDS[number // 2 % len(KINDS)], balance=balance, rng=rng)
        yield sample(f"colin27-skull-{number:04d}", [picture], [asked], task="skull")


def _files(split: str, domain: str, extra: Sequence[Picture], balance: Balance) -> Iterator[Built]:
    """Yield modality and organ questions about held-out files; the wrong options are the other true values."""
    pictures = [p for still in STILLS if still.split == split and still.domain == domain for p in crops(still)] + list(extra)
    for family in ("modality", "organ"):
        known = [
            picture
            for picture in pictures
            if family in picture.facts and picture.facts[family] in (*FAMILIES["organ"].values, picture.modality)
        ]
        pool = tuple(sorted({word(family, picture.facts[family]) for picture in known}))
        if len(pool) < 3:
            continue
        for number, picture in enumerate(known[:: 1 if family == "modality" else 2]):
            rng = seeded("files", split, domain, family, number)
            asked = ask(family, picture.facts[family], kind=KINDS[number % len(KINDS)], balance=balance, rng=rng, pool=pool)
            yield sample(f"files-{family}-{domain}-{number:04d}", [picture], [asked], task=family)


def _val(balance: Balance) -> Iterator[Built]:
    """Yield the validation questions: the brain of a macaque, an angiogram and an echocardiogram."""
    volume = load("inia19")
    for family, count in {"plane": 54, "level_axial": 24, "level_coronal": 24, "level_sagittal": 12, "facing": 24}.items():
        yield from _probe(volume, family, count, balance, prefix="inia19", domain="in")
    yield from _pairs(volume, 16, balance, augment=False, prefix="inia19-pair")
    slices = [slice_of(volume, seeded("val", n), number=n, augment=False, look=Look()) for n in range(36)]
    yield from _files("val", "in", slices[:12], balance)
    for number, picture in enumerate(slices[12:]):
        yield sample(f"inia19-caption-{number:03d}", [picture], [caption(picture, seeded("val-caption", number))], task="caption")


def _test(balance: Balance) -> Iterator[Built]:
    """Yield the test questions: Colin27 without its skull is in-domain, with its skull shifted; held-out files of either kind."""
    volume, head = load("colin27"), load("colin27-head")
    wanted = {"plane": 120, "level_axial": 60, "level_coronal": 60, "level_sagittal": 36, "facing": 72}
    for family, count in wanted.items():
        yield from _probe(volume, family, count, balance, prefix="colin27", domain="in")
        yield from _probe(head, family, count // 2, balance, prefix="colin27", domain="shifted")
    yield from _skull(60, balance)
    yield from _pairs(volume, 80, balance, augment=False, prefix="colin27-pair")
    slices = [slice_of(volume, seeded("mr", n), number=n, augment=False, look=Look(n % 4 < 2)) for n in range(36)]
    yield from _files("test", "in", slices, balance)
    yield from _files("test", "shifted", (), balance)


def _general(split: str) -> Iterator[Built]:
    """Yield coloured shapes of easy-vqa: three turns a picture in training, else one; its own test pictures serve val and test."""
    folder = "train" if split == "train" else "test"
    known: dict[int, dict[str, str]] = {}
    for text, answer, image in json.loads(member("easy-vqa", f"easy_vqa/data/{folder}/questions.json")):
        family = "colour" if "what color" in text else "shape" if text.startswith("what") else None
        if family is not None and answer in FAMILIES[family].values:
            known.setdefault(image, {})[family] = answer
    images = [image for image in sorted(known) if len(known[image]) == 2]
    chosen = {"train": images[:260], "val": images[:24], "test": images[24:120]}[split]
    balance, package = Balance(f"general/{split}"), PACKAGES["easy-vqa"]
    for number, image in enumerate(chosen):
        rng = seeded("general", split, image)
        path = f"easy_vqa/data/{folder}/images/{image}.png"
        data = (fetch("easy-vqa") / path).read_bytes()
        patient, provenance = (
            f"easyvqa/{folder}/{image}",
            f"{package.spec}:{path}#colour={known[image]['colour']};shape={known[image]['shape']}",
        )
        picture = Picture(data, "png", "easyvqa", patient, package.licence, provenance, "general", "none", "in", known[image])
        families = rng.sample(("colour", "shape"), 2)
        if split == "train":
            turns = [ask(f, known[image][f], kind=rng.choice(KINDS), balance=balance, rng=rng) for f in (*families, families[0])]
            yield sample(f"easyvqa-{image:05d}", [picture], turns, task="mixed")
        else:
            family = ("colour", "shape")[number % 2]
            asked = ask(family, known[image][family], kind=KINDS[number // 2 % len(KINDS)], balance=balance, rng=rng)
            yield sample(f"easyvqa-{family}-{image:05d}", [picture], [asked], task=family)


def _text(split: str) -> Iterator[Built]:
    """Yield text-only questions: three different terms a sample in training, else one."""
    size = 6 if split == "train" else 1
    asked = list(facts.questions(split))
    for number in range(0, len(asked) - len(asked) % size, size):
        group = asked[number : number + size]
        terms = ",".join(term.replace(" ", "-") for term, _ in group)
        about = Picture(b"", "", "facts", f"facts/{split}", "MIT", f"infimed:tools/samples/facts.py#{terms}", "text", "none")
        built, _ = sample(f"facts-{number:04d}", [about], [turn for _, turn in group], task="terms")
        first = built.messages[0]
        messages = (Message("user", first.text.removeprefix(f"{IMAGE_PLACEHOLDER}\n")), *built.messages[1:])
        yield Sample(**{**built.__dict__, "messages": messages, "images": ()}), ()
