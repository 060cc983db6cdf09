from __future__ import annotations

import json
import pickle
import weakref
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from infimed.contracts import UserError
from infimed.models import checkpoints
from infimed.models.checkpoints import find_checkpoint, read_checkpoint, read_state, write_safetensors
from infimed.models.weights import load_checkpoint


def save(model, path, **extra):
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state, "infimed": {"config": {"name": "a run"}}, **extra}, path)


def test_init_from_takes_all_weights_or_says_why_not(make_model, tmp_path):
    source, target = make_model(), make_model(visual_grid=4)  # another grid: the same weights
    save(source, tmp_path / "last.ckpt")
    load_checkpoint(target, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    with pytest.raises(UserError, match="choose the `model=` that it was made with"):
        load_checkpoint(make_model(layers=1), tmp_path)


def test_a_checkpoint_with_nan_names_the_tensors_and_the_file(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.projector.linear_1.weight[3, 5] = float("nan")
        model.language.model.norm.weight[0] = float("-inf")
    save(model, tmp_path / "last.ckpt")
    with pytest.raises(UserError) as error:
        load_checkpoint(make_model(), tmp_path)
    assert str(error.value).splitlines() == [
        f"{tmp_path}/last.ckpt holds NaN or infinity in 2 tensors; take another copy",
        "  projector.linear_1.weight",
        "  language.model.norm.weight",
    ]


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


def test_a_sharded_checkpoint_is_refused_by_its_name(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / ".metadata").touch()
    with pytest.raises(UserError, match=r"last\.ckpt is a sharded checkpoint"):
        find_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("mmap", [False, True])
def test_a_checkpoint_never_runs_code(tmp_path, capsys, mmap):
    torch.save({"state_dict": {}, "infimed": {}, "bomb": Bomb()}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt", mmap=mmap)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "plain.ckpt", mmap=mmap)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mmap", [False, True])
def test_truncated_and_foreign_checkpoints_are_refused(make_model, tmp_path, mmap):
    save(make_model(), tmp_path / "last.ckpt")
    data = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="may be truncated"):
        read_checkpoint(tmp_path / "cut.ckpt", mmap=mmap)
    (tmp_path / "text.ckpt").write_bytes(b"hello")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "text.ckpt", mmap=mmap)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not written by this project"):
        read_checkpoint(tmp_path / "other.ckpt", mmap=mmap)


def test_the_state_of_a_checkpoint_is_named_by_component_and_stays_on_the_disk(make_model, tmp_path):
    model = make_model()
    save(model, tmp_path / "last.ckpt", optimizer_states=[{"exp_avg": torch.zeros(4)}])
    state, config = read_state(tmp_path)
    assert config == {"name": "a run"}
    assert {name.split(".")[0] for name in state} == {"vision", "projector", "language"}
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path / "last.ckpt") in maps.read_text()


def tensors():
    return {
        "a": torch.randn(8, 4),
        "flag": torch.tensor([True, False, True]),
        "b": torch.randn(3, 5).bfloat16().T,  # not contiguous
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "c": torch.randn(16, 4),
    }


def test_one_file_suffices_and_reads_back_equal(tmp_path):
    write_safetensors(tmp_path / "out", tensors_ := tensors())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == tensors_.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors_.items())


def test_files_stay_below_the_limit_and_the_index_finds_every_tensor(tmp_path):
    write_safetensors(tmp_path / "out", tensors_ := tensors(), max_shard_bytes=200)  # `c` alone has 256 bytes
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors_.values())
    files = {file.name: load_file(file) for file in (tmp_path / "out").glob("*.safetensors")}
    assert sorted(files) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert {k: name for name, held in files.items() for k in held} == index["weight_map"]
    for held in files.values():
        assert len(held) == 1 or sum(t.numel() * t.itemsize for t in held.values()) <= 200
    assert all(torch.equal(files[name][k], tensors_[k]) for k, name in index["weight_map"].items())


def test_a_target_type_changes_floating_point_alone(tmp_path):
    write_safetensors(tmp_path / "out", tensors_ := tensors(), dtype=torch.bfloat16)
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for t in back.values()} == {"torch.bfloat16", "torch.bool", "torch.int64"}
    assert torch.equal(back["a"], tensors_["a"].bfloat16())


class Lazy(UserDict):
    """Makes a value when it is asked for, and remembers how many were alive at once."""

    alive = most = 0

    def __getitem__(self, name):
        tensor = super().__getitem__(name).clone()
        weakref.finalize(tensor, self._gone)
        self.alive += 1
        self.most = max(self.most, self.alive)
        return tensor

    def _gone(self):
        self.alive -= 1


def test_values_are_made_one_at_a_time(tmp_path):
    lazy = Lazy(tensors())
    write_safetensors(tmp_path / "out", lazy, dtype=torch.bfloat16)
    assert lazy.most <= 2  # the one that is written, the one that is just made
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == lazy.keys()


def test_transformers_reads_the_folder(tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "out")  # a folder that is there keeps its files
    write_safetensors(tmp_path / "out", model.state_dict(), max_shard_bytes=20_000)
    back, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(back.state_dict()[k], v) for k, v in model.state_dict().items())


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(UserError, match=rf"needs 4\.00 GiB, 1\.00 GiB are free at {tmp_path}"):
        write_safetensors(tmp_path / "a" / "out", {"big": torch.empty(2**30, device="meta")})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing_and_weights_are_never_overwritten(tmp_path):
    broken = {"a": torch.zeros(4), "b": torch.empty(4, device="meta")}  # `b` cannot be copied
    with pytest.raises(NotImplementedError):
        write_safetensors(tmp_path / "out", broken)
    assert not list(tmp_path.iterdir())
    write_safetensors(tmp_path / "out", {"a": torch.zeros(4)})
    with pytest.raises(UserError, match="holds safetensors already"):
        write_safetensors(tmp_path / "out", {"a": torch.ones(4)})
    assert not load_file(tmp_path / "out" / "model.safetensors")["a"].any()


def test_a_type_without_a_name_in_the_format_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"waves is torch\.complex64, which cannot be written"):
        write_safetensors(tmp_path / "out", {"waves": torch.zeros(2, dtype=torch.complex64)})


def test_tensors_of_every_width_are_aligned_in_a_file(tmp_path):
    tensors = {
        "bytes": torch.zeros(3, dtype=torch.uint8),
        "halves": torch.zeros(3, dtype=torch.bfloat16),
        "longs": torch.zeros(2, dtype=torch.int64),
    }
    write_safetensors(tmp_path / "out", tensors)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items())


def test_into_a_folder_that_exists_the_index_comes_last(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    order, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: order.append(self.name) or rename(self, target))
    write_safetensors(tmp_path / "out", {"a": torch.zeros(4), "b": torch.zeros(4)}, max_shard_bytes=16)
    assert order[-1] == "model.safetensors.index.json"
    assert len(order) == 3
