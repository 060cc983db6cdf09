"""A tiny tokenizer of Qwen3's make, and the real one where tools/fetch_tokenizer.py has brought it."""

import os
from pathlib import Path

import pytest

from infimed.processing.tokenizer import Tokenizer, train_tokenizer

QWEN3 = Path(__file__).parents[2] / ".cache" / "tokenizer-qwen3"
TEXTS = ("Which plane is shown? The axial plane of a CT.", "Is the liver visible? Yes.", "user", "assistant", "system") * 5


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, vocab_size=400).save(str(path))
    return Tokenizer.load(path)


@pytest.fixture(scope="session")
def qwen3_folder() -> Path:
    if not (QWEN3 / "tokenizer.json").is_file() and os.environ.get("INFIMED_REQUIRE_QWEN3") != "1":
        pytest.skip("Qwen3's tokenizer is not in .cache: python tools/fetch_tokenizer.py")
    return QWEN3


@pytest.fixture(scope="session")
def qwen3(qwen3_folder: Path) -> Tokenizer:
    return Tokenizer.load(qwen3_folder)
