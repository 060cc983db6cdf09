from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from transformers import SiglipConfig, SiglipModel

from infimed.contracts import UserError
from infimed.models.weights import find_checkpoint, load_checkpoint, load_hub_folders, read_checkpoint


def write_hub_folders(model, folder):
    """Write what the hub has: a whole SigLIP (text tower, pooling head and last block included) and a sharded decoder without lm_head."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    stock = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
    (folder / "vision").mkdir()
    save_file({k: v.contiguous() for k, v in stock.state_dict().items()}, folder / "vision" / "model.safetensors")
    (folder / "language").mkdir()
    state = {k: v for k, v in model.language.state_dict().items() if k != "lm_head.weight"}
    names, half = list(state), len(state) // 2
    shards = {"model-1.safetensors": names[:half], "model-2.safetensors": names[half:]}
    for file, keys in shards.items():
        save_file({k: state[k].clone() for k in keys}, folder / "language" / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (folder / "language" / "model.safetensors.index.json").write_text(json.dumps(index))
    return stock


def test_hub_folders_load_whole_and_tied(make_model, tmp_path):
    source, target = make_model(), make_model()
    stock = write_hub_folders(source, tmp_path)
    load_hub_folders(target, vision=tmp_path / "vision", language=tmp_path / "language")
    for name, value in source.language.state_dict().items():
        assert torch.equal(target.language.state_dict()[name], value), name
    assert target.language.lm_head.weight is target.language.model.embed_tokens.weight
    vision = stock.vision_model.state_dict()
    for name, value in target.vision.state_dict().items():
        assert torch.equal(vision[name], value), name


def test_a_folder_of_another_size_names_every_key_at_once(make_model, tmp_path):
    write_hub_folders(make_model(), tmp_path)
    with pytest.raises(UserError) as error:
        load_hub_folders(make_model(layers=1), vision=tmp_path / "vision", language=tmp_path / "language")
    assert "11 keys" in str(error.value)  # a decoder block
    assert "unexpected: model.layers.1.mlp.down_proj.weight [32, 64]" in str(error.value)


def test_a_missing_shard_is_named(make_model, tmp_path):
    write_hub_folders(make_model(), tmp_path)
    (tmp_path / "language" / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-2\.safetensors"):
        load_hub_folders(make_model(), vision=tmp_path / "vision", language=tmp_path / "language")


def test_an_index_that_points_outside_its_folder_is_refused(make_model, tmp_path):
    write_hub_folders(make_model(), tmp_path)
    (tmp_path / "language" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../vision/model.safetensors"}}')
    with pytest.raises(UserError, match="lacks"):
        load_hub_folders(make_model(), vision=tmp_path / "vision", language=tmp_path / "language")


def save(model, path, **extra):
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "infimed": {"config": {}}, **extra}, path)


def test_init_from_takes_all_weights_or_says_why_not(make_model, tmp_path):
    source, target = make_model(), make_model(visual_grid=4)  # another grid: the same weights
    save(source, tmp_path / "last.ckpt")
    load_checkpoint(target, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    with pytest.raises(UserError, match="choose the `model=` that it was made with"):
        load_checkpoint(make_model(layers=1), tmp_path)


@pytest.mark.parametrize("typed", ["run/last.ckpt", "run/last", "run"])
def test_a_checkpoint_is_found_the_ways_people_type_it(tmp_path, typed):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").touch()
    assert find_checkpoint(tmp_path / typed) == tmp_path / "run" / "last.ckpt"


def test_a_missing_checkpoint_names_those_that_exist(tmp_path):
    (tmp_path / "1_pretrain").mkdir()
    (tmp_path / "1_pretrain" / "last.ckpt").touch()
    with pytest.raises(UserError, match=r"these exist: .*1_pretrain"):
        find_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_checkpoint_never_runs_code(tmp_path, capsys):
    torch.save({"state_dict": {}, "infimed": {}, "bomb": Bomb()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "plain.ckpt")
    assert capsys.readouterr().out == ""


def test_truncated_and_foreign_checkpoints_are_refused(make_model, tmp_path):
    save(make_model(), tmp_path / "last.ckpt")
    data = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="may be truncated"):
        read_checkpoint(tmp_path / "cut.ckpt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not written by this project"):
        read_checkpoint(tmp_path / "other.ckpt")
