"""Text-only questions: terms of imaging and anatomy with their meaning, written for this project."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tools.samples.picture import seeded
from tools.samples.questions import LETTERS, MISSING, Asked, Balance

TERMS = {
    "axial plane": "cuts the body into an upper and a lower part",
    "coronal plane": "cuts the body into a front and a back part",
    "sagittal plane": "cuts the body into a left and a right part",
    "midsagittal plane": "cuts the body into two equal sides",
    "oblique plane": "is tilted against all three main planes",
    "CT": "turns X-rays from many angles into slices",
    "MR": "uses a strong magnet and radio waves",
    "ultrasound": "makes pictures from echoes of sound",
    "X-ray radiography": "shows shadows of dense tissue in one projection",
    "nuclear medicine": "detects radiation from a tracer inside the body",
    "PET": "detects pairs of photons from a positron tracer",
    "fundus photography": "takes a picture of the back of the eye",
    "fluorescence microscopy": "makes stained molecules glow under light",
    "histology": "studies thin stained sections of tissue",
    "echocardiography": "shows the beating heart with sound",
    "angiography": "shows the inside of blood vessels",
    "mammography": "takes X-ray pictures of the breast",
    "endoscopy": "looks inside the body with a camera on a tube",
    "Hounsfield unit": "is the unit of grey values in CT",
    "window": "chooses the range of grey values that is displayed",
    "voxel": "is the smallest element of a volume",
    "pixel": "is the smallest element of a picture",
    "DICOM": "is the file standard of medical pictures",
    "NIfTI": "is a file format of brain volumes",
    "contrast agent": "makes vessels or organs stand out in a picture",
    "anterior": "means towards the front",
    "posterior": "means towards the back",
    "superior": "means towards the head",
    "inferior": "means towards the feet",
    "medial": "means towards the middle of the body",
    "lateral": "means towards the side of the body",
    "proximal": "means nearer to the trunk",
    "distal": "means further from the trunk",
    "grey matter": "holds the cell bodies of the brain",
    "white matter": "holds the nerve fibres of the brain",
    "cerebellum": "lies at the lower back of the brain",
    "corpus callosum": "joins the two halves of the brain",
    "ventricles": "are the spaces of the brain filled with fluid",
    "skull stripping": "removes everything but the brain from a volume",
    "brain atlas": "names the regions of a standard brain",
    "haematoxylin": "stains the nuclei of cells blue",
    "eosin": "stains the body of cells pink",
    "retina": "is the layer of the eye that senses light",
    "optic disc": "is where the nerve leaves the eye",
    "T1 weighting": "shows fat bright and water dark in MR",
    "T2 weighting": "shows water bright in MR",
    "slice thickness": "is the depth of tissue in one slice",
    "field of view": "is the area that a picture covers",
}

_YES_NO = ("Is it true that {term} {meaning}?", "{term}: does this term fit the words '{meaning}'?", "Would you say that {term} {meaning}?")
_CHOICE = ("Which term fits: it {meaning}?", "What {meaning}?", "Choose the term that {meaning}.")
_OPEN = ("Name the term: it {meaning}.", "Which word fits: it {meaning}?")


def questions(split: str) -> Iterator[tuple[str, Asked]]:
    """Yield (term, question) of a split: every kind thrice in training, one question a term in test, every second term in val."""
    balance = Balance(f"facts/{split}")
    kinds = {"train": ("choice", "yes_no", "open"), "val": ("choice",), "test": ("yes_no", "choice")}[split]
    for round_ in range({"train": 6, "val": 1, "test": 1}[split]):
        for number, term in enumerate(seeded("terms", split, round_).sample(list(TERMS), len(TERMS))):
            if split == "val" and number % 2:
                continue
            yield term, _ask(term, kinds[(number + round_) % len(kinds)], balance, seeded("facts", split, round_, term))


def _ask(term: str, kind: str, balance: Balance, rng: random.Random) -> Asked:
    """Put one question about a term."""
    others = rng.sample([other for other in TERMS if other != term], 3)
    if kind == "yes_no":
        answer = balance.deal("yes_no", ("yes", "no"))
        meaning = TERMS[term if answer == "yes" else others[0]]
        return Asked(f"{rng.choice(_YES_NO).format(term=term, meaning=meaning)} {MISSING[0]}", str(answer), "yes_no")
    if kind == "open":
        return Asked(f"{rng.choice(_OPEN).format(meaning=TERMS[term])} {MISSING[2]}", term, "open")
    place = int(balance.deal("letter", (0, 1, 2, 3)))
    options = [*others[:place], term, *others[place:]]
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    return Asked(f"{rng.choice(_CHOICE).format(meaning=TERMS[term])}\n{lines}\n{MISSING[1]}", LETTERS[place], "choice", tuple(options))
