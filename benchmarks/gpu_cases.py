"""What is trained (models, stages, a synthetic packed stream), how a step is timed, and our own cases: O1 to O4.

The stream is the protocol's: documents of one stage with a fixed sum of tokens a row and uneven text lengths (log-normal), the real shapes
of our models (384-pixel squares: 729 patches, pooled to 144 or 729 tokens). It lies on the device before the clock starts: no loader is
timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml
from gpu_loops import LightningLoop, RawLoop, Skip
from torch import nn

from infimed.contracts import IGNORE_INDEX, Batch, Encoded, Images
from infimed.data.collate import collate
from infimed.models.attention import KERNELS, resolve
from infimed.models.compile import compile_blocks
from infimed.models.language import qwen3
from infimed.models.projector import AveragePoolMLP
from infimed.models.vision import SiglipTower
from infimed.models.vlm import InfiMed
from infimed.processing.flops import Work, flops, shape_of
from infimed.processing.image import normalise, unpatchify
from infimed.processing.resolution import Resolution

CONF = Path(__file__).resolve().parents[1] / "conf" / "model"
MODELS = {"1.7b": "infimed_1_7b", "4b": "infimed_4b", "tiny": "tiny"}
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A row of work."""

    documents: int  # a row
    tokens: int  # of a document, in the mean
    images: int = 0  # a document
    visual_grid: int = 12
    supervised: float = 1.0  # share of the text, the last tokens of each document
    trained: tuple[str, ...] = ("vision", "projector", "language")

    def scaled(self, tokens: int) -> Stage:
        """Return the stage for rows of another length."""
        return replace(self, documents=max(1, round(self.documents * tokens / 16_384)))


STAGES = {
    "s1": Stage(documents=102, tokens=160, images=1, trained=("projector",)),
    "s2": Stage(documents=33, tokens=496, images=1, supervised=0.7),
    "sft": Stage(documents=11, tokens=1380, images=5, supervised=0.7, trained=("projector", "language")),
    "sft729": Stage(documents=11, tokens=1380, images=1, visual_grid=27, supervised=0.7, trained=("projector", "language")),
    "text": Stage(documents=8, tokens=2048, trained=("language",)),
}
FROZEN_TOWER = {("4b", "s2"): ("projector", "language")}
"""What learns where it is not as `STAGES` says."""

TINY = {
    "s1": Stage(documents=8, tokens=32, images=1, visual_grid=4, trained=("projector",)),
    "s2": Stage(documents=4, tokens=64, images=1, visual_grid=4, supervised=0.7),
    "sft": Stage(documents=2, tokens=128, images=3, visual_grid=4, supervised=0.7, trained=("projector", "language")),
    "sft729": Stage(documents=2, tokens=128, images=1, visual_grid=8, supervised=0.7, trained=("projector", "language")),
    "text": Stage(documents=4, tokens=64, visual_grid=4, trained=("language",)),
}
"""The same stages for the tiny model on a CPU."""


@dataclass(frozen=True)
class Row:
    """One packed row on the device, and the same images as a batch of pictures for those who want them so."""

    batch: Batch
    lengths: tuple[int, ...]  # tokens of each document
    pixels: torch.Tensor  # float[N, 3, H, W], normalised; those of all documents, in order
    work: Work


@dataclass(frozen=True, kw_only=True)
class World:
    """Where a case runs."""

    device: torch.device
    sizes: Mapping[str, Mapping[str, int]]
    stage: Stage
    trained: tuple[str, ...]
    rows: Sequence[Row]
    image_token: int
    accumulate: int  # rows an optimizer step
    precision: str  # of our own cases: bf16 (weights, gradients, moments), mixed (float32 under autocast), fp32
    compiler: str  # backend of torch.compile

    def rows_of(self, step: int) -> list[Row]:
        """Return the rows of an optimizer step."""
        return [self.rows[i % len(self.rows)] for i in range(step * self.accumulate, (step + 1) * self.accumulate)]

    @property
    def tflop(self) -> float:
        """Honest TFLOP of an optimizer step, in the mean over the rows."""
        shape = shape_of(self.sizes)
        return self.accumulate * statistics.mean(flops(shape, row.work, trained=self.trained).total for row in self.rows) / 1e12


def sizes_of(model: str) -> dict[str, dict[str, int]]:
    """Read a model's sizes off conf/model without Hydra, which a GPU host may lack."""
    page = yaml.safe_load((CONF / f"{MODELS[model]}.yaml").read_text())
    for base in page.get("defaults", []):
        if base != "_self_":
            below = yaml.safe_load((CONF / f"{base}.yaml").read_text())
            page = {**below, **{k: {**below[k], **v} if isinstance(v, dict) else v for k, v in page.items()}}
    parts = {name: {k: v for k, v in page[name].items() if k != "_target_"} for name in ("vision", "projector", "language")}
    parts["projector"] = {"in_features": parts["vision"]["hidden_size"], "out_features": parts["language"]["hidden_size"]}
    return parts


def make_rows(
    stage: Stage, *, sizes: Mapping[str, Mapping[str, int]], rows: int, spread: float, image_token: int, device: torch.device
) -> list[Row]:
    """Draw a stream of `rows` packed rows, all with the same pictures; `spread` is the log-normal sigma of the text lengths."""
    dice = torch.Generator().manual_seed(SEED)
    vision = sizes["vision"]
    resolution = Resolution(patch_size=vision["patch_size"], image_size=vision["image_size"], visual_grid=stage.visual_grid)
    grid, visual = resolution.largest, stage.images * stage.visual_grid**2
    patches, count = grid[0] * grid[1], stage.documents * stage.images
    pictures = torch.randint(256, (count * patches, 3 * vision["patch_size"] ** 2), dtype=torch.uint8, generator=dice)
    pixels = torch.stack([normalise(unpatchify(p, grid)) for p in pictures.split(patches)]).to(device) if count else torch.empty(0)
    row_tokens = -(-stage.documents * stage.tokens // 128) * 128
    made = []
    for step in range(rows):
        texts = _text_lengths(stage, stage.tokens - visual, spread=spread, dice=dice)
        encoded = []
        for number, text in enumerate(texts):
            ids = torch.cat([torch.full((visual,), image_token), torch.randint(image_token, (text,), generator=dice)])
            labels = ids.clone()
            labels[: max(1, len(ids) - round(stage.supervised * text))] = IGNORE_INDEX
            mine = pictures[number * stage.images * patches : (number + 1) * stage.images * patches]
            encoded.append(Encoded(str(number), "synthetic", ids, labels, Images.of(mine, [grid] * stage.images)))
        batch = collate(encoded, row_tokens=row_tokens, pad_id=0, resolution=resolution, sources=("synthetic",), step=step)
        lengths = tuple(len(sample.input_ids) for sample in encoded)
        work = Work.of(documents=lengths, images=[patches] * count, visual_tokens=batch.visual_tokens, supervised=batch.supervised_tokens)
        batch = replace(batch, images=made[0].batch.images if made else batch.images)  # the same pictures: on the device once
        made.append(Row(batch.to(device), lengths, pixels, work))
    return made


def _text_lengths(stage: Stage, mean: int, *, spread: float, dice: torch.Generator) -> list[int]:
    """Draw the text tokens of a row's documents: their sum is always the same."""
    weights = torch.exp(spread * torch.randn(stage.documents, generator=dice))
    lengths = [max(2, int(x)) for x in weights / weights.sum() * mean * stage.documents]
    lengths[lengths.index(max(lengths))] += mean * stage.documents - sum(lengths)
    return lengths


def build(world: World, *, dtype: torch.dtype, attention: str = "auto") -> InfiMed:
    """Build the model at random init on the device: the same numbers whatever the type; buffers (RoPE) stay float32."""
    torch.manual_seed(SEED)
    vision = world.sizes["vision"]
    resolution = Resolution(patch_size=vision["patch_size"], image_size=vision["image_size"], visual_grid=world.stage.visual_grid)
    with world.device:
        model = InfiMed(
            resolution=resolution,
            vision=SiglipTower(**vision),
            projector=AveragePoolMLP(**world.sizes["projector"], visual_grid=world.stage.visual_grid),
            language=qwen3(**world.sizes["language"]),
            image_token_id=world.image_token,
            attention=attention,
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def freeze(model: nn.Module, trained: Sequence[str]) -> None:
    """Let the named parts learn, freeze the others, and switch to training mode."""
    for name in ("vision", "projector", "language"):
        getattr(model, name).requires_grad_(name in trained)
    model.train()


def adamw(model: nn.Module, **options: bool) -> torch.optim.Optimizer:
    """Build AdamW over what learns, with the same numbers for every case."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, **options)


def ours(world: World, *, lightning: bool = False, fp8: bool = False, attention: str = "auto") -> RawLoop | LightningLoop:
    """Build our model with its blocks compiled; O1, and with options the others."""
    mixed = world.precision == "mixed"
    dtype = torch.bfloat16 if world.precision == "bf16" else torch.float32
    model = build(world, dtype=dtype, attention=attention)
    freeze(model, world.trained)
    if fp8:
        _to_fp8(model, world.device)
    compile_blocks(model, backend=world.compiler)
    kernel = resolve(attention, device=world.device, dtype=torch.bfloat16 if mixed else dtype)
    about = {"attention": kernel, "precision": world.precision, "compiler": world.compiler}
    if lightning:
        return LightningLoop(world, model, about=about)

    def loss(batch: Batch) -> torch.Tensor:
        packed = {"position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
        return model(batch.input_ids, batch.labels, batch.images, rows=batch.rows, **packed).total

    optimizer = adamw(model, fused=world.device.type == "cuda")
    return RawLoop(world, model, loss, optimizer, parts=_whole_row, autocast=mixed, about=about)


def best_attention(world: World) -> str:
    """Name the kernel that is not the default and likely the fastest here. Raises: Skip if there is none."""
    if world.device.type != "cuda":
        raise Skip("needs CUDA: on a CPU there is one kernel with a backward")
    reasons = []
    for name in ("flash3", "flash4", "flash2", "flex"):
        try:
            return resolve(name, device=world.device, dtype=torch.bfloat16)
        except ValueError as error:
            reasons.append(str(error))
    raise Skip("; ".join(reasons) + f" (of {', '.join(KERNELS)})")


def _whole_row(row: Row, micro_batches: int) -> list[dict]:
    return [{"batch": row.batch, "slots": row.batch.input_ids.numel()}]


def _to_fp8(model: InfiMed, device: torch.device) -> None:
    """Compute the decoder blocks' products in fp8 with torchao's tensor-wise scales; head, tower and projector stay. Raises: Skip."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise Skip("fp8 needs a CUDA device of compute capability 8.9")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise Skip(f"torchao is not installed ({error})") from error
    convert_to_float8_training(model.language.model.layers)


OURS = {
    "O1": ours,
    "O2": partial(ours, lightning=True),
    "O3": partial(ours, lightning=True, fp8=True),
    "O4": lambda world: ours(world, attention=best_attention(world)),
}
