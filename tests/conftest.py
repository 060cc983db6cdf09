from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from infimed.contracts import Images, Message, Sample
from infimed.data.shards import write_shards
from infimed.models.language import qwen3
from infimed.models.projector import AveragePoolMLP
from infimed.models.vision import SiglipTower
from infimed.models.vlm import InfiMed
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
IMAGE_ID = 60

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., InfiMed]:
    """Build a model of a few thousand parameters, random init, the shipped classes."""

    def make(*, visual_grid: int = 2, layers: int = 2, feature_layer: int = -2) -> InfiMed:
        vision = SiglipTower(
            image_size=28,
            patch_size=7,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            feature_layer=feature_layer,
        )
        language = qwen3(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        projector = AveragePoolMLP(in_features=32, out_features=32, visual_grid=visual_grid)
        resolution = Resolution(patch_size=7, image_size=28, visual_grid=visual_grid)
        return InfiMed(resolution=resolution, vision=vision, projector=projector, language=language, image_token_id=IMAGE_ID)

    return make


def noise(*grids: tuple[int, int], patch_size: int = 7) -> Images:
    """Make images of random pixels, of the given grids of patches."""
    count = sum(rows * columns for rows, columns in grids)
    return Images.of(torch.randint(0, 256, (count, 3 * patch_size**2), dtype=torch.uint8), grids)


@pytest.fixture
def tiny_shards(tmp_path: Path) -> Path:
    """Hold train, val and test shards of coloured squares: enough to learn something in a few steps."""
    return write_squares(tmp_path)


def write_squares(folder: Path, *, sizes: Sequence[tuple[int, int]] = ((16, 16),)) -> Path:
    """Write shards of coloured rectangles, squares unless `sizes` says otherwise, into `folder`/train, val and test."""
    tokenizer = Tokenizer.load(ROOT / "samples" / "tokenizer")
    colours = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200)}

    def samples(split: str, count: int) -> Iterator[tuple[Sample, list[bytes]]]:
        for i in range(count):
            name = list(colours)[i % 3]
            file = io.BytesIO()
            Image.new("RGB", sizes[i % len(sizes)], tuple(min(255, c + i % 40) for c in colours[name])).save(file, "PNG")
            kind, question, answer = (
                ("caption", "<image>\nDescribe the image.", f"A {name} square."),
                ("open", "<image>\nWhat is the colour?", name),
                ("yes_no", "<image>\nIs it red?", "yes" if name == "red" else "no"),
            )[i // 3 % 3]
            yield (
                Sample(
                    key=f"{split}-{i:04d}",
                    messages=(Message("user", question), Message("assistant", answer)),
                    images=("0.png",),
                    source=("squares", "general")[i % 2],
                    task="colour",
                    modality="none",
                    organ="none",
                    answer_type=kind,
                    patient=f"{split}-{i}",
                    licence="CC0-1.0",
                    provenance="drawn by the tests",
                ),
                [file.getvalue()],
            )

    for split, count in (("train", 120), ("val", 12), ("test", 18)):
        write_shards(samples(split, count), folder / split, tokenizer=tokenizer)
    return folder
