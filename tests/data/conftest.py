"""Small shards to stream from: a tokenizer trained in milliseconds and 8x8 PNGs, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sample_factory import WORDS, mixed

from infimed.data.datamodule import ShardDataModule
from infimed.data.shards import write_shards
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer, train_tokenizer

RESOLUTION = Resolution(patch_size=4, image_size=16, visual_grid=2)


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([" ".join(WORDS)] * 3, vocab_size=380).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(scope="session")
def shards_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Sixty samples in three shards; read only."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(mixed(60), folder, max_samples=20, tokenizer=tokenizer)
    return folder


@pytest.fixture
def make_module(shards_path: Path, tokenizer_path: Path) -> Callable[..., ShardDataModule]:
    """Build a data module over the sixty samples; keyword arguments override."""

    def make(**changes: object) -> ShardDataModule:
        settings = {"train": [shards_path], "tokenizer": tokenizer_path, "resolution": RESOLUTION}
        return ShardDataModule(**{**settings, "max_tokens": 80, "packs_per_batch": 2, "epochs": 1, "seed": 7, **changes})

    return make
