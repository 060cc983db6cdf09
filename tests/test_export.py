"""The export's promise: what it leaves is the trained model, and what is not leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors import safe_open

from infimed import export
from infimed.contracts import UserError
from infimed.models import parity, stock
from infimed.models.adapters import add_adapters
from infimed.models.shells import Llava
from infimed.processing.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.models.test_shells import TOKENIZER, build, model_options, projector
from tests.training.support import configured
from tools import check_vllm


def checkpoint(folder: Path, shell: str, **parts: dict) -> Path:
    """Write a checkpoint as training does, of a model at random init."""
    tokenizer, options = Tokenizer.load(TOKENIZER), model_options(shell, **parts)
    torch.manual_seed(0)
    model = instantiate(options, image_token_id=tokenizer.image_id)
    config = {
        "name": "sft_stage3",
        "model": options,
        "tokenizer": str(TOKENIZER),
        "init_from": "/home/someone/secret/last.ckpt",
        "weights": {"vision": "/home/someone/siglip-so400m", "language": None},
        "system": {"lr": 1e-5, "anything": ["/home/someone/notes"]},
        "data": {"train": ["/home/someone/hospital"]},
    }
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "infimed": {"config": config, "tokenizer": tokenizer.fingerprint}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def asked(ckpt: Path, out: Path, *extra: str) -> DictConfig:
    return configured([f"ckpt={ckpt}", f"out={out}", "cpu_threads=1", *extra], "export")


@pytest.fixture(scope="module", params=["llava", "lfm2_vl"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, export.main(asked(checkpoint(folder, request.param), folder / "new" / "out"))


def test_what_is_exported_is_proven_equal_in_both_types(exported):
    shell, out = exported
    proof = json.loads((out / "parity.json").read_text())
    assert proof["passed"] is True
    assert (proof["shell"], proof["weights"]) == (shell, "bfloat16")
    assert set(proof["cases"]) == {"text_only", "one_image", "several_images_and_turns"}
    for case in proof["cases"].values():
        for quantity in ("pixels", "features", "logits"):
            # measured: 1.7e-6 (float32), 0.03 of at most 0.07 (bfloat16)
            assert case["float32"][quantity]["apart"] <= case["float32"][quantity]["limit"] <= 1e-4
            assert case["bfloat16"][quantity]["apart"] <= case["bfloat16"][quantity]["limit"] < 0.1
        assert case["float32"]["greedy_tokens_equal"] == 32 == len(case["greedy"]["float32"])
    answers = {tuple(case["greedy"]["float32"]) for case in proof["cases"].values()}
    assert len(answers) == 3  # the model is no constant, or the comparison would say nothing
    assert {"model.safetensors", "tokenizer.json", "parity/one_image_0.png"} <= proof["files"].keys()


def test_the_folder_holds_everything_a_stock_user_needs_and_no_place_of_this_machine(exported):
    shell, out = exported
    assert not Path(f"{out}.part").exists()
    names = {path.name for path in out.iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    for path in (path for path in out.iterdir() if path.suffix in (".json", ".md", ".jinja")):
        for secret in ("/home", "hospital", str(ROOT), str(out.parent), "_name_or_path"):
            assert secret not in path.read_text(), path.name
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118  not a dict
    card = (out / "README.md").read_text()
    for said in ("not for clinical use", "no weights of", "sft_stage3", "vision siglip-so400m", "not recorded", "## What was not verified"):
        assert said in card
    assert (" # needs torchvision" in card) == (shell == "lfm2_vl")


@pytest.fixture
def _short(monkeypatch):
    """Fewer greedy tokens, where they are not what is tested."""
    monkeypatch.setattr(parity, "NEW_TOKENS", 2)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize(
    ("shell", "part", "said"),
    [
        ("llava", "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight", "case one_image, float32: features"),
        ("llava", "multi_modal_projector.linear_2.bias", "features"),
        ("llava", "language_model.model.layers.1.mlp.down_proj.weight", "case text_only, float32: logits"),
        ("lfm2_vl", "model.vision_tower.vision_model.post_layernorm.weight", "features"),
        ("lfm2_vl", "model.multi_modal_projector.linear_1.weight", "features"),
    ],
)
def test_a_corrupted_weight_is_found_and_nothing_is_left(tmp_path, monkeypatch, shell, part, said):
    write = export.write_safetensors

    def corrupt(folder, tensors, **options):
        broken = tensors[part].clone()
        broken.view(-1)[5] += 0.25  # one number of one tensor
        write(folder, {**tensors, part: broken}, **options)

    monkeypatch.setattr(export, "write_safetensors", corrupt)
    with pytest.raises(UserError, match=f"not the one that was trained.*\n(.*\n)*.*{said} .* apart, limit"):
        export.main(asked(checkpoint(tmp_path, shell), tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt"}


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {k: v for k, v in tensors.items() if "layer_norm2" not in k}, "missing_keys.*layer_norm2"),
        (lambda tensors: {**tensors, "model.adapter.weight": torch.ones(1)}, "unexpected_keys.*adapter"),
        (lambda tensors: {k: v.fill_(torch.nan) if k.endswith("linear_2.bias") else v for k, v in tensors.items()}, "features nan apart"),
    ],
)
def test_missing_extra_and_nan_weights_are_refused(tmp_path, monkeypatch, change, said):
    write = export.write_safetensors
    monkeypatch.setattr(export, "write_safetensors", lambda folder, tensors, **options: write(folder, change(clone(tensors)), **options))
    with pytest.raises(UserError, match=said):
        export.main(asked(checkpoint(tmp_path, "llava"), tmp_path / "out"))


def clone(tensors: dict) -> dict:
    return {key: value.clone() for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"greedy": [1, 2, 9, 4]}, "the greedy answers part at token 2"),
        ({"input_ids": [1, 2]}, "other token ids: 3 ours, 2 of the stock processor"),
        ({"features": torch.ones(2, 3)}, "features inf apart"),
        ({"logits": torch.full((2, 3), 2.001)}, "logits 5.00e-04 apart, limit 1.00e-04"),
        ({"pixels": torch.full((2, 3), 0.5 + 1e-5)}, "pixels 1.00e-05 apart, limit 1.00e-06"),
    ],
)
def test_every_quantity_is_compared(change, said):
    seen = parity.Seen([1, 2, 3], torch.full((2, 3), 0.5), torch.ones(3, 3), torch.full((2, 3), 2.0), [1, 2, 3, 4])
    assert parity.compare(seen, replace(seen), float32=seen)[1] == []
    problems = parity.compare(seen, replace(seen, **change), float32=seen)[1]
    assert len(problems) == 1
    assert said in problems[0]


def test_bfloat16_may_round_as_far_as_ours_does_and_part_in_a_near_tie():
    exact = parity.Seen([1], torch.ones(1, 3), torch.ones(1, 3), torch.ones(1, 3), [1, 2, 3, 4])
    ours = replace(exact, logits=torch.full((1, 3), 0.99))
    measured, problems = parity.compare(ours, replace(ours, logits=torch.full((1, 3), 1.02), greedy=[1, 7, 7, 7]), float32=exact)
    assert problems == []
    assert measured["greedy_tokens_equal"] == 1
    assert measured["logits"]["limit"] == pytest.approx(2 * 0.01 / 0.99 + 4 / 256)
    assert parity.compare(ours, replace(ours, logits=torch.full((1, 3), 1.04)), float32=exact)[1]


@pytest.mark.usefixtures("_short")
def test_another_chat_template_is_refused(tmp_path, monkeypatch):
    template = export.chat_template
    monkeypatch.setattr(export, "chat_template", lambda shell: template(shell).replace("<think>\\n\\n</think>", "<think></think>"))
    with pytest.raises(UserError, match="case text_only, float32: other token ids: 60 ours, 59 of the stock processor"):
        export.main(asked(checkpoint(tmp_path, "lfm2_vl"), tmp_path / "out"))


@pytest.mark.usefixtures("_short")
def test_another_normalisation_is_refused(tmp_path, monkeypatch):
    honest = Llava.preprocessor
    monkeypatch.setattr(Llava, "preprocessor", lambda self, model: {**honest(self, model), "image_mean": [0.48] * 3})
    with pytest.raises(UserError, match=r"case one_image, float32: pixels 4\.00e-02 apart"):
        export.main(asked(checkpoint(tmp_path, "llava"), tmp_path / "out"))


UNSHUFFLED = {"projector": projector("UnshuffleMLP", factor=2, hidden_features=24) | {"pre_norm": True}}
BY_THREE = {
    "projector": projector("BlockPoolMLP", pool=3),
    "resolution": {"patch_size": 7, "pool": 3, "min_visual_tokens": 1, "max_visual_tokens": 9},
}
LARGER = {"projector": projector("AveragePoolMLP", visual_grid=6), "resolution": {"patch_size": 7, "image_size": 42, "visual_grid": 6}}
EDGE = {"resolution": {"patch_size": 7, "image_size": 33, "visual_grid": 4}}  # 4.7 patches a side, like 384 pixels in patches of 14


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize(
    ("shell", "parts", "dtype"),
    [("lfm2_vl", UNSHUFFLED, "bfloat16"), ("lfm2_vl", BY_THREE, "float32"), ("llava", LARGER, "float32"), ("llava", EDGE, "bfloat16")],
    ids=["unshuffle with norm", "blocks of three", "resized positions", "pixels left over"],
)
def test_other_models_that_fit_are_exported_too(tmp_path, shell, parts, dtype):
    out = export.main(asked(checkpoint(tmp_path, shell, **parts), tmp_path / "out", f"dtype={dtype}"))
    assert json.loads((out / "parity.json").read_text())["passed"]


@pytest.mark.parametrize(("shell", "parts"), [("lfm2_vl", BY_THREE), ("llava", LARGER)])
def test_a_conversion_that_bfloat16_cannot_hold_is_refused(tmp_path, shell, parts):
    with pytest.raises(UserError, match=r"cannot hold these converted weights exactly: .*; use dtype=float32"):
        export.main(asked(checkpoint(tmp_path, shell, **parts), tmp_path / "out"))


@pytest.mark.usefixtures("_short")
def test_an_empty_folder_may_be_filled_and_a_full_one_never(tmp_path):
    ckpt, out = checkpoint(tmp_path, "llava"), tmp_path / "out"
    out.mkdir()
    export.main(asked(ckpt, out))
    before = (out / "parity.json").read_bytes()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export.main(asked(ckpt, out))
    assert (out / "parity.json").read_bytes() == before


def test_every_wrong_option_is_named_at_once(tmp_path):
    with pytest.raises(UserError, match=r"ckpt is not set.*\n- out is not set.*\n- dtype=int8: expected bfloat16 or float32"):
        export.main(configured(["dtype=int8"], "export"))


@pytest.mark.usefixtures("_short")
def test_adapters_are_merged_into_the_weights(tmp_path):
    pytest.importorskip("peft")
    path, adapters = checkpoint(tmp_path, "llava"), {"language": {"rank": 2, "alpha": 4, "targets": ["q_proj"]}}
    stored, (model, _) = torch.load(path, weights_only=True), build("llava")
    name = "model.layers.1.self_attn.q_proj"
    before = stored["state_dict"][f"model.language.{name}.weight"]
    add_adapters(model, adapters)
    layer = model.language.get_submodule(name)
    layer.lora_A["default"].weight.data.fill_(0.5)
    layer.lora_B["default"].weight.data.fill_(0.25)
    stored["state_dict"] = {f"model.{key}": value for key, value in model.state_dict().items()}
    stored["infimed"]["config"]["adapters"] = adapters
    torch.save(stored, path)
    out = export.main(asked(path, tmp_path / "out", "dtype=float32"))
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert not any("lora" in key or "base_layer" in key for key in file.keys())  # noqa: SIM118  not a dict
        torch.testing.assert_close(file.get_tensor(f"language_model.{name}.weight"), before + 4 / 2 * 2 * 0.5 * 0.25)


def test_the_command_line_exports(tmp_path):
    command = [sys.executable, "-m", "infimed.export", f"ckpt={checkpoint(tmp_path, 'lfm2_vl')}", f"out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the same model as" in done.stdout
    model = stock.load_stock(tmp_path / "out", torch.bfloat16)
    assert type(model).__name__ == "Lfm2VlForConditionalGeneration"


def test_the_vllm_check_asks_what_the_proof_asked(exported, capsys):
    _, out = exported
    case = json.loads((out / "parity.json").read_text())["cases"]["several_images_and_turns"]
    turn = check_vllm.to_openai(case["messages"][1], out)
    assert turn["role"] == "user"
    assert turn["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert len(check_vllm.files_of(case["messages"])) == 3
    assert (check_vllm.equal_tokens([1, 2, 3], [1, 2, 4]), check_vllm.equal_tokens([1, 2], [1, 2])) == (2, 2)
    with pytest.raises(SystemExit):
        check_vllm.main([str(out.parent)])
    assert "holds no parity.json" in capsys.readouterr().err
