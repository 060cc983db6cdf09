"""The vocabulary that every room of the house speaks: frozen dataclasses and protocols, nothing of ours imported.

Shape letters: B packs, T tokens of a row, S samples (segments) of a row, N images, H/W pixels, V visual tokens an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

IGNORE_INDEX = -100
"""Label of a token that is not learned from (torch's cross-entropy default)."""

IMAGE_PLACEHOLDER = "<image>"
"""Where an image stands in a message's text; one a picture, in the order of `Sample.images`."""

COMPONENTS = ("vision", "projector", "language")
"""The three parts of the model, always by these names."""

Role = Literal["system", "user", "assistant"]
AnswerType = Literal["yes_no", "choice", "open", "caption"]


class UserError(ValueError):
    """A mistake that the user can mend: says what was given, what was expected and the fix. Entry points print it and exit 2."""


class DataFault(ValueError):
    """A fault of one sample (bytes, image, schema, length): quarantined and counted, never a crash by itself.

    Attributes:
        reason: a short snake_case code that counters are kept by, such as `checksum` or `undecodable_image`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Message:
    """One turn. `text` may hold `<image>` placeholders (user turns only)."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One training or test conversation with everything that must be known about it. The JSON member of a shard is this, minus pixels."""

    key: str
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()  # member names inside the shard, e.g. ("0.jpg",); their bytes travel beside the sample
    source: str = "unknown"  # data set name; losses and faults are counted by it
    task: str = "unknown"  # question family: plane, level, modality, ...
    modality: str = "unknown"  # MR, CT, US, XR, fundus, histology, fluorescence, text, ...
    organ: str = "unknown"
    answer_type: AnswerType = "open"
    choices: tuple[str, ...] = ()  # option texts of a multiple-choice question, in the order A, B, C, ...
    patient: str = "unknown"  # patient, volume or file cluster; splits never share one
    domain: str = "in"  # `in` or `shifted`: the kind of test set that the sample belongs to
    licence: str = "unknown"  # SPDX identifier or short name
    provenance: str = "unknown"  # package==version:path#slice that the image came from


@dataclass(frozen=True)
class Encoded:
    """A sample as numbers. The first label is always IGNORE_INDEX, so that no loss crosses a segment border."""

    key: str
    source: str
    input_ids: torch.Tensor  # int64[L]
    labels: torch.Tensor  # int64[L], IGNORE_INDEX where not learned from; position i is predicted from i - 1
    pixel_values: torch.Tensor  # uint8[N, 3, H, W]; normalised on the device


@dataclass(frozen=True)
class Pack:
    """Samples that share a row, as row numbers of the index (metadata only)."""

    rows: tuple[int, ...]
    tokens: int  # sum of their lengths


@dataclass(frozen=True)
class Batch:
    """What one micro-step of one rank consumes: a single row of T tokens that holds S isolated segments.

    Padding, if any, is one last segment of label IGNORE_INDEX that belongs to no sample.
    """

    input_ids: torch.Tensor  # int64[1, T]
    labels: torch.Tensor  # int64[1, T]
    position_ids: torch.Tensor  # int64[1, T], restart at 0 in every segment
    cu_seqlens: torch.Tensor  # int32[segments + 1], 0 ... T
    max_seqlen: int  # longest segment
    pixel_values: torch.Tensor  # uint8[N, 3, H, W]
    source_ids: torch.Tensor  # int64[1, T], index into `sources`; 0 on padding, which nothing is learned from
    sources: tuple[str, ...]
    keys: tuple[str, ...]  # S sample keys, in row order (holes left out)
    step: int  # micro-step of the plan that this batch is
    tokens: int  # tokens that are not padding
    visual_tokens: int
    supervised_tokens: int  # labels that are not IGNORE_INDEX
    faults: Mapping[str, int] = field(default_factory=dict)  # `source/reason` -> count of this batch's quarantined samples


@dataclass(frozen=True)
class EvalItem:
    """One question to put to a model."""

    id: str
    prompt: tuple[Message, ...]  # everything before the answer
    images: tuple[bytes, ...]  # encoded files
    gold: str
    answer_type: AnswerType
    choices: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)  # task, modality, organ, domain, source, ...
    cluster: str = "unknown"  # resampling unit of the interval: the image or the patient


@dataclass(frozen=True)
class Verdict:
    """The score of one response, with the rule that gave it."""

    status: str  # letter, text, yes_no, open, abstain, malformed, empty
    extracted: str  # what was read out of the response; empty when nothing was
    correct: bool
    rule: str


class Task(Protocol):
    """A benchmark: its questions and how an answer is judged. About fifty lines each."""

    name: str

    def items(self) -> Iterable[EvalItem]:
        """Yield the questions in a fixed order."""
        ...

    def score(self, item: EvalItem, response: str) -> Verdict:
        """Judge one response; pure, never guesses, never raises on an ugly answer."""
        ...
