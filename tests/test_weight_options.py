"""`weights.vision` and `weights.language`: folders or hub names, checked before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import SiglipConfig

from infimed.config import stages
from infimed.contracts import UserError
from infimed.models import hub
from tests.conftest import ROOT
from tests.training.support import configured, tiny

TOWER, DECODER = "google/siglip-so400m-patch14-384", "Qwen/Qwen3-1.7B"


def cached(cache: Path, name: str, config: dict, *, weights: bool = True) -> Path:
    """Lay a published model into a hub cache, as downloading does."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(config))
    shutil.copy(ROOT / "samples" / "tokenizer" / "tokenizer.json", snapshot)
    if weights:
        save_file({"logit_scale": torch.zeros(1)}, snapshot / "model.safetensors")
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    return tmp_path / "cache"


def options(*extra: str) -> list[str]:
    """The tiny model from the published names; its tokenizer is left to follow `weights.language`."""
    told = [option for option in tiny(Path("nowhere"), Path("run"), "data.train=[]", "data.val=[]") if not option.startswith("tokenizer=")]
    return [*told, f"weights.vision={TOWER}", f"weights.language={DECODER}", *extra]


def dimensions(part: str) -> dict:
    section = OmegaConf.to_container(configured(options()).model[part], resolve=True)
    return {key: value for key, value in section.items() if key != "_target_"}


def problems(*extra: str) -> str:
    with pytest.raises(UserError) as error:
        stages(configured(options(*extra)))
    return str(error.value)


def test_hub_names_become_the_caches_folders_everywhere(cache):
    tower = cached(cache, TOWER, SiglipConfig(vision_config=dimensions("vision")).to_dict())
    decoder = cached(cache, DECODER, {"model_type": "qwen3", **dimensions("language")})
    (stage,) = stages(configured(options()))
    assert stage.weights == {"vision": str(tower), "language": str(decoder)}
    assert stage.tokenizer == stage.data["tokenizer"] == str(decoder)


def test_a_name_that_is_not_in_the_cache_comes_with_its_command(cache):
    cached(cache, DECODER, {}, weights=False)  # somebody read its configuration once
    said = problems()
    where = "hf download google/siglip-so400m-patch14-384 --local-dir weights/siglip-so400m-patch14-384"
    assert f"weights.vision={TOWER} is no folder here and not complete in the hub cache (looked in {cache}); get them with: {where}" in said
    assert f"weights.language={DECODER} (" in said
    assert "holds no safetensors weights; get them with: hf download Qwen/Qwen3-1.7B --local-dir weights/Qwen3-1.7B" in said


def test_a_path_is_never_taken_for_a_hub_name(cache):
    for path in ("weights/Qwen3-1.7B", "shards/Qwen3-1.7B", "/weights/Qwen3-1.7B", "./Qwen3-1.7B", "a/b/c", "Qwen3-1.7B", "../Qwen3"):
        assert not hub.is_hub_name(path), path
    assert hub.is_hub_name(DECODER)
    (cache.parent / "Qwen").mkdir()
    assert not hub.is_hub_name(DECODER)


@pytest.mark.parametrize(("offline", "fetches"), [("1", False), (None, False), ("", False), ("0", True)])
def test_nothing_is_fetched_unless_offline_is_switched_off(cache, monkeypatch, offline, fetches):
    asked = []

    def pretend(name, *, local_files_only, allow_patterns):
        asked.append((name, local_files_only, allow_patterns))
        raise OSError("no network here")

    monkeypatch.setattr(hub, "snapshot_download", pretend)
    monkeypatch.delenv("HF_HUB_OFFLINE") if offline is None else monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    said = problems()
    assert asked[0] == (TOWER, not fetches, ["*.safetensors", "*.json"])
    assert ("no network here" in said) == fetches


def test_a_folder_of_other_dimensions_is_refused_before_anything_is_loaded(cache):
    vision = dimensions("vision")
    cached(cache, TOWER, SiglipConfig(vision_config={**vision, "num_hidden_layers": 27, "hidden_size": 1152}).to_dict())
    cached(cache, DECODER, {"model_type": "qwen3", **dimensions("language"), "vocab_size": 151936})
    said = problems()
    assert f"num_hidden_layers: the folder says 27, the model has {vision['num_hidden_layers']}" in said
    assert f"hidden_size: the folder says 1152, the model has {vision['hidden_size']}" in said
    assert "vocab_size: the folder says 151936" in said


def test_a_part_that_has_no_weights_is_named(cache):
    assert "weights.projector: expected vision or language" in problems("+weights.projector=somewhere")
