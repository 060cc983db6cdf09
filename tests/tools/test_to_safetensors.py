from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from tools.to_safetensors import main


def save(path, state):
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "infimed": {"config": {}}}, path)


def test_a_checkpoint_becomes_a_folder_of_the_same_weights(make_model, tmp_path, capsys):
    state = make_model().state_dict()
    save(tmp_path / "last.ckpt", state)
    assert main([str(tmp_path), str(tmp_path / "one")]) == 0
    assert f"{len(state)} tensors" in capsys.readouterr().out
    written = load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    assert main([str(tmp_path), str(tmp_path / "many"), "--dtype", "bfloat16", "--max-shard-gib", "1e-5"]) == 0
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert len(set(index["weight_map"].values())) > 1


def test_what_cannot_be_written_is_one_line_and_exit_2(make_model, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    save(tmp_path / "last.ckpt", {**make_model().state_dict(), "language.q_proj.lora_A.default.weight": torch.zeros(1)})
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds adapters" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "out"), "--max-shard-gib", "0"]) == 2
    assert not (tmp_path / "out").exists()
