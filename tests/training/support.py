"""Run the shipped training entry point in this process, at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import lightning
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from infimed import train
from tests.conftest import ROOT

SINGLE = ("pretrain", "sft_stage1", "sft_stage2", "sft_stage3")

# Values, not only groups: what an experiment writes beats a group chosen on the command line.
TINY_MODEL = (
    "model=tiny",
    "model.vision.image_size=28",
    "model.vision.patch_size=7",
    "model.vision.hidden_size=32",
    "model.vision.intermediate_size=64",
    "model.vision.num_hidden_layers=2",
    "model.vision.num_attention_heads=2",
    "model.language.hidden_size=32",
    "model.language.intermediate_size=64",
    "model.language.num_hidden_layers=2",
    "model.language.head_dim=8",
)


class Cut(Exception):
    """The power went off."""


class CutAfter(lightning.Callback):
    """Fail in the step after `step`; every step before it has been saved."""

    def __init__(self, *, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            raise Cut


def run_and_cut(overrides: list[str], *, step: int) -> None:
    cut = f"+callbacks.cut={{_target_: tests.training.support.CutAfter, step: {step}}}"
    with pytest.raises(Cut):
        run([*overrides, cut, "callbacks.checkpoint.every_n_train_steps=1"])


def configured(overrides: list[str], name: str = "train") -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, overrides)


def tiny(shards: Path, run_dir: Path, *extra: str, experiment: str = "pretrain", steps: int = 4) -> list[str]:
    return [
        f"experiment={experiment}",
        *TINY_MODEL,
        "trainer=cpu",
        f"tokenizer={ROOT / 'samples' / 'tokenizer'}",
        "weights.vision=null",
        "weights.language=null",
        f"data.train=[{shards / 'train'}]",
        f"data.val=[{shards / 'val'}]",
        "data.num_workers=0",
        "data.max_tokens=160",
        "resolution.visual_grid=2",
        "global_batch=1",
        f"max_steps={steps}",
        "callbacks.progress.refresh_rate=0",
        "callbacks.panel.count=2",
        "system.lr=1e-3",
        f"run_dir={run_dir}",
        *extra,
    ]


def run(overrides: list[str]) -> float:
    return train.train(configured(overrides))


def steps_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
