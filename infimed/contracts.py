"""The vocabulary that every room of the house speaks: frozen dataclasses and protocols, nothing of ours imported.

Shape letters: B packs, T tokens of a row, S samples (segments) of a row, N images, P patches of all
images, H/W pixels, V visual tokens, R supervised rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, Protocol, Self

import torch

IGNORE_INDEX = -100
"""Label of a token that is not learned from (torch's cross-entropy default)."""

IMAGE_PLACEHOLDER = "<image>"
"""Where an image stands in a message's text; one a picture, in the order of `Sample.images`."""

ROWS = 128
"""Supervised rows come in multiples of this: few distinct shapes, and whole tiles for a matrix product."""

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
class Images:
    """Pictures of any size as one packed row of patches; the tower's attention stops at their borders."""

    patches: torch.Tensor  # uint8[P, patch_size ** 2 * 3] of all images, row by row in each; a patch is (row, column, channel)
    grids: tuple[tuple[int, int], ...]  # N times (rows, columns) of patches: plain numbers, so that no device is asked for a shape
    cu_seqlens: torch.Tensor  # int32[slots + 1], 0 ... P: where images begin and end, see `borders`

    def __len__(self) -> int:
        """Count the images."""
        return len(self.grids)

    @property
    def max_seqlen(self) -> int:
        """Bound the patches of one image from above."""
        return bucket(max((rows * columns for rows, columns in self.grids), default=1))

    @classmethod
    def of(cls, patches: torch.Tensor, grids: Iterable[tuple[int, int]]) -> Self:
        """Add the borders."""
        grids = tuple(grids)
        return cls(patches, grids, borders([rows * columns for rows, columns in grids]))

    @classmethod
    def join(cls, parts: Iterable[Self], *, patch_dim: int) -> Self:
        """Lay the images of several samples end to end; `patch_dim` is the width of a patch, for the case that there is none."""
        parts = list(parts)
        empty = torch.zeros((0, patch_dim), dtype=torch.uint8)
        return cls.of(torch.cat([empty, *(part.patches for part in parts)]), (grid for part in parts for grid in part.grids))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Put every tensor through `change`."""
        return replace(self, patches=change(self.patches), cu_seqlens=change(self.cu_seqlens))

    def to(self, device: torch.device) -> Self:
        """Return the images on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def bucket(count: int) -> int:
    """Round up to a power of two, so that few distinct values reach a compiled kernel."""
    return 1 << max(0, count - 1).bit_length()


def borders(lengths: Sequence[int]) -> torch.Tensor:
    """Return int32[slots + 1]: 0, the running sum of `lengths`, then its end again up to a power of two of slots (empty segments)."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat([ends, ends[-1:].expand(bucket(len(lengths)) - len(lengths))])


@dataclass(frozen=True)
class Encoded:
    """A sample as numbers. The first label is always IGNORE_INDEX, so that no loss crosses a segment border."""

    key: str
    source: str
    input_ids: torch.Tensor  # int64[L]
    labels: torch.Tensor  # int64[L], IGNORE_INDEX where not learned from; position i is predicted from i - 1
    images: Images


@dataclass(frozen=True)
class Pack:
    """Samples that share a row, as row numbers of the index (metadata only)."""

    rows: tuple[int, ...]
    tokens: int  # sum of their lengths
    spans: tuple[tuple[int, int], ...] = ()  # tokens [start, stop) that each shows; empty, as nearly always: all of each
    number: int = 0  # of all packs of the plan, whatever the world size; 0 for one that holds nothing


@dataclass(frozen=True)
class Batch:
    """What one micro-step of one rank consumes: a single row of T tokens that holds S isolated segments.

    Padding, if any, is one last segment of label IGNORE_INDEX that belongs to no sample.
    """

    input_ids: torch.Tensor  # int64[1, T]
    labels: torch.Tensor  # int64[1, T]
    position_ids: torch.Tensor  # int64[1, T], restart at 0 in every segment
    rows: torch.Tensor  # int64[R], flat positions of the supervised tokens, then zeros (never supervised) up to a multiple of ROWS
    cu_seqlens: torch.Tensor  # int32[slots + 1], 0 ... T, see `borders`
    max_seqlen: int  # bound of the longest segment, a power of two or T
    images: Images
    source_ids: torch.Tensor  # int64[1, T], index into `sources`; 0 on padding, which nothing is learned from
    sources: tuple[str, ...]
    keys: tuple[str, ...]  # S sample keys, in row order (holes left out)
    lengths: tuple[int, ...]  # tokens of each segment that is no padding: plain numbers, for what is counted on the host
    step: int  # micro-step of the plan that this batch is
    tokens: int  # tokens that are not padding
    visual_tokens: int
    supervised_tokens: int  # labels that are not IGNORE_INDEX
    source_tokens: tuple[int, ...] = ()  # tokens of each of `sources`
    faults: Mapping[str, int] = field(default_factory=dict)  # `source/reason` -> count of this batch's quarantined samples
    holes: tuple[int, ...] = ()  # places of these among all samples that the plan put here, in row order
    position: Mapping[str, object] | None = None  # where the plan stands once this batch is consumed (`data.plan.PlanState`)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """Put every tensor through `change`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)}
        return replace(self, images=self.images.map(change), **{name: change(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return the batch in pinned memory, from which copies to a GPU need not be waited for; the loader asks for it by this name."""
        return self.map(torch.Tensor.pin_memory)


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
