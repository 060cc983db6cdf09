"""The vision side of benchmarks/training.py: the any-aspect tower of the tiny model, packed as ours or padded as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from transformers import Siglip2VisionModel

from infimed.contracts import Images
from infimed.models.projector import BlockPoolMLP
from infimed.models.vision import NaflexTower
from infimed.processing.image import normalise

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "model" / "any_tiny.yaml"
POOL = 2  # as the shipped experiments of any aspect


def draw(tokens: int, *, generator: torch.Generator) -> Images:
    """Make one image of noise whose visual tokens are as near to `tokens` as a grid of about a square allows."""
    rows = isqrt(tokens)
    columns = round(tokens / rows)
    dim = 3 * OmegaConf.load(CONFIG).vision.patch_size ** 2
    patches = torch.randint(0, 256, (POOL**2 * rows * columns, dim), dtype=torch.uint8, generator=generator)
    return Images.of(patches, [(POOL * rows, POOL * columns)])


class See(nn.Module):
    """Tower and projector, from images to visual tokens; the same weights either way."""

    def __init__(self, *, packed: bool, out_features: int) -> None:
        """Build both at random init; not packed: transformers' own class with its own attention."""
        super().__init__()
        torch.manual_seed(0)
        tower: NaflexTower = instantiate(OmegaConf.load(CONFIG).vision)
        self.projector = BlockPoolMLP(in_features=tower.hidden_size, out_features=out_features, pool=POOL)
        self.tower = tower
        if not packed:
            self.tower = Siglip2VisionModel(tower.config)
            self.tower.load_state_dict(tower.state_dict())  # strict: the same names
            self.tower.set_attn_implementation("sdpa")

    def forward(self, images: Images | dict) -> torch.Tensor:
        """Return float[V, D]. A dict holds what `pad` made."""
        if isinstance(images, Images):
            return self.projector(self.tower(images), images.grids)
        mask = images["pixel_attention_mask"]
        seen = self.tower(**images).last_hidden_state[mask.bool()]
        return self.projector(seen, [tuple(grid) for grid in images["spatial_shapes"].tolist()])


def pad(images: Sequence[Images]) -> dict[str, torch.Tensor]:
    """Lay images out as transformers' processor does, but only as long as the longest of the batch; normalised beforehand."""
    sizes = [len(image.patches) for image in images]
    pixels = torch.nn.utils.rnn.pad_sequence([normalise(image.patches) for image in images], batch_first=True)
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]).long()
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([image.grids[0] for image in images])}
