"""Questions about known facts, in several wordings, with answers that the wording does not give away."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

from tools.samples.picture import Picture
from tools.samples.stills import MODALITY

LETTERS = "ABCD"
ORGANS = ("brain", "abdomen", "heart", "chest", "eye")


@dataclass(frozen=True)
class Family:
    """A question family: its possible values and its wordings. `{x}` in a yes/no wording is the value that is asked for."""

    values: tuple[str, ...]
    ask: tuple[str, ...]  # for choice and open questions
    yes_no: tuple[str, ...]


FAMILIES = {
    "plane": Family(
        ("axial", "coronal", "sagittal"),
        (
            "In which plane is this slice?",
            "Which anatomical plane does the picture show?",
            "What is the plane of this slice?",
            "How was the head cut here: which plane is it?",
        ),
        (
            "Is this an {x} slice?",
            "Does the picture show the {x} plane?",
            "Was the head cut in the {x} plane here?",
            "Is {x} the plane of this slice?",
        ),
    ),
    "modality": Family(
        tuple(MODALITY.values()),
        ("Which modality made this picture?", "How was this picture made?", "What kind of imaging is this?", "Name the imaging modality."),
        ("Was this picture made by {x}?", "Is {x} the modality of this picture?", "Does the picture come from {x}?"),
    ),
    "organ": Family(
        ORGANS,
        ("Which part of the body is shown?", "What body part does the picture show?", "Which region of the body was imaged?"),
        ("Does the picture show the {x}?", "Is the {x} the part that was imaged?", "Was the {x} imaged here?"),
    ),
    "level_axial": Family(
        ("upper", "lower"),
        (
            "Which half of the brain does this slice come from?",
            "From which half of the brain is the slice?",
            "Does the slice lie in the upper or in the lower half of the brain?",
        ),
        (
            "Is this slice from the {x} half of the brain?",
            "Does the slice lie in the {x} half of the brain?",
            "Was the {x} half of the brain cut here?",
        ),
    ),
    "level_coronal": Family(
        ("front", "back"),
        (
            "Which half of the brain does this slice come from?",
            "From which half of the brain is the slice?",
            "Does the slice lie in the front or in the back half of the brain?",
        ),
        (
            "Is this slice from the {x} half of the brain?",
            "Does the slice lie in the {x} half of the brain?",
            "Was the {x} half of the brain cut here?",
        ),
    ),
    "level_sagittal": Family(
        ("middle", "side"),
        (
            "Where does this slice come from, the middle or the side of the brain?",
            "Is the slice near the middle or at the side of the brain?",
        ),
        ("Is this slice from the {x} of the brain?", "Was the {x} of the brain cut here?", "Does the slice lie at the {x} of the brain?"),
    ),
    "facing": Family(
        ("left", "right"),
        (
            "To which side of the picture does the front of the head point?",
            "Which way does the head face in the picture?",
            "On which side of the picture is the forehead?",
        ),
        (
            "Does the head face the {x} side of the picture?",
            "Is the front of the head on the {x} of the picture?",
            "Does the forehead point to the {x}?",
        ),
    ),
    "skull": Family(
        ("with the skull", "without the skull"),
        ("How is the brain shown?", "Is the brain shown with or without the skull?", "With or without the skull: how is the brain shown?"),
        ("Is the brain shown {x}?", "Does the picture show the brain {x}?", "Is the brain in this picture {x}?"),
    ),
    "colour": Family(
        ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
        ("What colour is the shape?", "Which colour does the shape have?", "Name the colour of the shape."),
        ("Is the shape {x}?", "Is {x} the colour of the shape?", "Do you see a {x} shape?"),
    ),
    "shape": Family(
        ("circle", "rectangle", "triangle"),
        ("What shape is this?", "Which shape is in the picture?", "Name the shape."),
        ("Is this a {x}?", "Is there a {x} in the picture?", "Does the picture show a {x}?"),
    ),
}
DESCRIBE = (
    "Describe this picture.",
    "What is shown here?",
    "Write a short caption.",
    "What does this picture show?",
    "Give a caption for this picture.",
)
MISSING = ("Answer yes or no.", "Answer with the letter.", "Answer in a few words.")


@dataclass(frozen=True)
class Asked:
    """One question with its answer; `text` lacks the image placeholder."""

    text: str
    answer: str
    answer_type: str
    choices: tuple[str, ...] = ()


class Balance:
    """Deals values in shuffled rounds, so that yes and no, and the letters, come equally often in every family."""

    def __init__(self, name: str) -> None:
        """`name` seeds the rounds."""
        self._rng = random.Random(f"balance/{name}")
        self._rounds: dict[object, list[object]] = defaultdict(list)

    def deal(self, key: object, values: tuple[object, ...]) -> object:
        """Return the next value of the round of `key`."""
        if not self._rounds[key]:
            self._rounds[key] = self._rng.sample(values, len(values))
        return self._rounds[key].pop()


def word(family: str, value: str) -> str:
    """Return the word that questions use for a fact."""
    return MODALITY[value] if family == "modality" else value


def ask(family: str, value: str, *, kind: str, balance: Balance, rng: random.Random, pool: tuple[str, ...] = ()) -> Asked:
    """Put one question of a family whose true value is known; kind = yes_no | choice | open.

    pool: values that wrong options come from; in a test the true values of its pictures alone, so that no option gives itself away.
    """
    spec, truth = FAMILIES[family], word(family, value)
    others = [other for other in (pool or spec.values) if other != truth]
    if kind == "yes_no":
        answer = balance.deal(("yes_no", family, truth), ("yes", "no"))
        asked = truth if answer == "yes" else rng.choice(others)
        text = rng.choice(spec.yes_no).format(x=asked)
        return Asked(f"{_article(text)} {MISSING[0]}", str(answer), "yes_no")
    if kind == "open":
        return Asked(rng.choice(spec.ask), truth, "open")
    size = min(4, len(others) + 1)
    place = balance.deal(("letter", family, truth), tuple(range(size)))
    options = rng.sample(others, size - 1)
    options.insert(int(place), truth)
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return Asked(f"{rng.choice(spec.ask)}\n{lines}\n{MISSING[1]}", LETTERS[int(place)], "choice", tuple(options))


def _article(text: str) -> str:
    """Mend `an` before a consonant."""
    return text.replace("an coronal", "a coronal").replace("an sagittal", "a sagittal")


def caption(picture: Picture, rng: random.Random) -> Asked:
    """Describe a picture by its facts alone."""
    return Asked(rng.choice(DESCRIBE), describe(picture), "caption")


def describe(picture: Picture) -> str:
    """Write the caption that the facts of a picture give."""
    facts = picture.facts
    modality = MODALITY[picture.modality]
    modality = modality[0].upper() + modality[1:]
    if "plane" not in facts:
        return f"{modality} picture" + ("." if picture.organ == "unknown" else f" of the {picture.organ}.")
    level = next((value for key, value in facts.items() if key.startswith("level_")), None)
    place = "" if level is None else f", {level}" + (" half" if level not in ("middle", "side") else "")
    facing = f", facing {facts['facing']}" if "facing" in facts else ""
    return f"{facts['plane'].capitalize()} {modality} slice of the {picture.organ} {facts['skull']}{place}{facing}."
