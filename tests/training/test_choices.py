"""Every choice of the README's table trains through the shipped entry point: towers, projectors, losses, adapters, compiled blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hydra.errors import InstantiationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

from infimed import train
from infimed.contracts import UserError
from infimed.evaluate import load_model
from infimed.models.language import qwen3
from infimed.training.run import HalfWeights
from tests.conftest import write_squares
from tests.training.support import run, run_and_cut, steps_of, tiny

BLOCKS = ("~model.projector.visual_grid", "resolution.visual_grid=null", "resolution.pool=2")
PROJECTORS = {
    "BlockPoolMLP": (*BLOCKS, "+model.projector.pool=2"),
    "UnshuffleMLP": (*BLOCKS, "+model.projector.factor=2"),
    "PerceiverResampler": (
        "~model.projector.visual_grid",
        *(f"+model.projector.{option}" for option in ("tokens_per_image=4", "depth=1", "heads=2")),
    ),
    "CAbstractor": ("+model.projector.depth=1", "+model.projector.hidden_features=16"),
}
ANY = (
    "model=any_tiny",
    "model.vision.patch_size=4",
    "model.vision.num_patches=16",
    "resolution.visual_grid=null",
    "resolution.pool=2",
    "resolution.min_visual_tokens=1",
    "resolution.max_visual_tokens=9",
)
LORA = "adapters={language: {rank: 2, alpha: 4, targets: [q_proj, v_proj]}}"


def any_aspect(shards, folder, *extra, steps=4):
    square = tiny(shards, folder, *extra, steps=steps)
    dropped = ("model=tiny", "model.vision.image_size", "model.vision.patch_size", "resolution.")
    return [override for override in square if not override.startswith(dropped)] + list(ANY)


def state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_projector_trains_and_is_rebuilt_from_its_checkpoint(tiny_shards, name):
    folder = tiny_shards / name
    chosen = [f"model.projector._target_=infimed.models.projector.{name}", *PROJECTORS[name]]
    assert math.isfinite(run(tiny(tiny_shards, folder, *chosen, steps=2)))
    model, _, _ = load_model(str(folder))
    assert type(model.projector).__name__ == name
    assert model.projector.tokens((4, 4)) == 4


def test_images_of_any_aspect_train_and_resume_bit_for_bit(tmp_path):
    tiny_shards = write_squares(tmp_path, sizes=((16, 16), (40, 12), (9, 33)))
    straight, stopped = tiny_shards / "straight", tiny_shards / "stopped"
    run(any_aspect(tiny_shards, straight, "system.trainable=[vision,projector,language]"))
    run_and_cut(any_aspect(tiny_shards, stopped, "system.trainable=[vision,projector,language]"), step=2)
    run(any_aspect(tiny_shards, stopped, "system.trainable=[vision,projector,language]"))
    assert steps_of(stopped) == steps_of(straight)
    model, _, _ = load_model(str(straight))
    assert model.resolution.image_size is None


def test_loss_kernels_agree_over_a_run(tiny_shards):
    for loss in ("chunked", "full"):
        run(tiny(tiny_shards, tiny_shards / loss, f"model.loss={loss}"))
    ours, plain = ([line["loss"] for line in steps_of(tiny_shards / loss)] for loss in ("chunked", "full"))
    assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_follows_float32(tiny_shards, precision):
    half, full = tiny_shards / "half", tiny_shards / "full"
    run(tiny(tiny_shards, half, f"trainer.precision={precision}"))
    run(tiny(tiny_shards, full))
    ours, plain = ([line["loss"] for line in steps_of(folder)] for folder in (half, full))
    assert ours == pytest.approx(plain, rel=2e-3)
    assert ours != plain
    assert {tensor.dtype for tensor in state(half).values()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


def test_bf16_weights_leave_the_rotary_frequencies_alone():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    language = qwen3(vocab_size=64, head_dim=8, **sizes)
    before = language.model.rotary_emb.inv_freq.clone()
    HalfWeights("bf16-true").convert_module(language)
    assert torch.equal(language.model.rotary_emb.inv_freq, before)
    assert {parameter.dtype for parameter in language.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed: expected auto, bf16-mixed"),
        ("model.attention=flash2", "attention=flash2 cannot run on cpu"),
        ("model.attention=flex", "attention=flex has no backward pass on a CPU"),
        ("model.loss=foo", "model.loss=foo: expected chunked, liger, full"),
        ("data.packing=tight", "packing='tight': expected one of packed, padded, unisolated, sequential"),
        ("model.projector._target_=infimed.models.projector.BlockPoolMLP ~model.projector.visual_grid +model.projector.pool=2", "pool 2"),
    ],
)
def test_what_cannot_run_is_refused_with_the_option(tiny_shards, overrides, message):
    with pytest.raises((UserError, InstantiationException), match=message):
        run(tiny(tiny_shards, tiny_shards / "run", *overrides.split(), steps=1))


def test_any_causal_lm_of_transformers_trains_from_its_folder_with_rows_to_spare(tiny_shards):
    folder = tiny_shards / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4000, tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    chosen = ["model.language._target_=infimed.models.language.causal_lm", f"+model.language.folder={folder}"]
    dropped = [f"~model.language.{key}" for key in (*sizes, "head_dim", "max_position_embeddings", "initializer_range")]
    square = [o for o in tiny(tiny_shards, tiny_shards / "run", steps=2) if not o.startswith("model.language")]
    run([*square, *chosen, *dropped, "model.language.vocab_size=4096", "model.projector.out_features=32"])
    model, _, _ = load_model(str(tiny_shards / "run"))
    assert model.language.config.model_type == "llama"
    assert model.language.config.vocab_size == 4096


def test_adapters_alone_learn_and_the_next_stage_and_inference_get_plain_weights(tiny_shards):
    folder = tiny_shards / "adapted"
    run(tiny(tiny_shards, tiny_shards / "base", steps=1))
    run(tiny(tiny_shards, folder, LORA, f"init_from={tiny_shards / 'base'}", "system.trainable=[language]"))
    base, adapted = state(tiny_shards / "base"), state(folder)
    names = {name for name in adapted if "lora_" in name}
    assert len(names) == 2 * 2 * 2  # A and B of two matrices in two layers
    assert all(torch.equal(adapted[name], base[name.replace(".base_layer", "")]) for name in adapted.keys() - names)
    model, _, _ = load_model(str(folder))
    merged = model.state_dict()
    assert merged.keys() == {name.removeprefix("model.") for name in base}
    changed = {name for name in merged if not torch.equal(merged[name], base[f"model.{name}"])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    run(tiny(tiny_shards, tiny_shards / "next", f"init_from={folder}", steps=1))
    assert not any("lora_" in name for name in state(tiny_shards / "next"))


def test_adapters_that_would_not_learn_and_those_that_hold_nan_are_refused(tiny_shards):
    with pytest.raises(
        InstantiationException, match=r"adapters.language would not learn: system.trainable is .*projector"
    ):  # the command line unwraps it
        run(tiny(tiny_shards, tiny_shards / "idle", LORA, "system.trainable=[projector]", steps=1))
    folder = tiny_shards / "adapted"
    run(tiny(tiny_shards, folder, LORA, steps=1))
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.language.model.norm.weight"][0] = float("nan")
    torch.save(checkpoint, folder / "last.ckpt")
    with pytest.raises(UserError, match=r"holds NaN or infinity in 1 tensors; .*\n.*language.model.norm.weight"):
        load_model(str(folder))


def test_an_adapted_run_goes_on_where_it_was_cut(tiny_shards):
    straight, stopped = tiny_shards / "straight", tiny_shards / "stopped"
    run(tiny(tiny_shards, straight, LORA))
    run_and_cut(tiny(tiny_shards, stopped, LORA), step=2)
    run(tiny(tiny_shards, stopped, LORA))
    assert steps_of(stopped) == steps_of(straight)


def test_blocks_are_compiled_when_asked_and_never_on_a_cpu_by_itself(tiny_shards, monkeypatch):
    compiled = []
    monkeypatch.setattr(train, "compile_blocks", compiled.append)
    run(tiny(tiny_shards, tiny_shards / "auto", steps=1))
    assert compiled == []
    run(tiny(tiny_shards, tiny_shards / "yes", "compile=yes", steps=1))
    assert len(compiled) == 1
    with pytest.raises(UserError, match="compile=maybe: expected auto, yes or no"):
        run(tiny(tiny_shards, tiny_shards / "maybe", "compile=maybe", steps=1))


def test_a_stage_prints_what_an_image_becomes_and_what_it_costs_and_logs_its_flops(tiny_shards, capsys):
    run(tiny(tiny_shards, tiny_shards / "run", "system.log_every=1", steps=2))
    shown = capsys.readouterr().out
    assert "image: square 28 x 28 px, 4 x 4 patches, averaged to 2 x 2 = 4 visual tokens" in shown
    assert "cost of the first row: " in shown
    assert "PFLOP this stage" in shown
    events = EventAccumulator(str(tiny_shards / "run")).Reload()
    assert events.Scalars("perf/tflops")[-1].value > 0
    assert [e.value for e in events.Scalars("train/silent_rows")] == [0, 0]


def test_a_fused_optimizer_clips_under_mixed_precision(tiny_shards, monkeypatch):
    """What a GPU run does by default; Lightning's own clipping raises there."""
    plain = torch.optim.AdamW
    monkeypatch.setattr("infimed.training.optim.torch.optim.AdamW", lambda groups, betas, fused: plain(groups, betas=betas, fused=True))
    folder = tiny_shards / "fused"
    run(tiny(tiny_shards, folder, "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1e-3"))
    losses = [line["loss"] for line in steps_of(folder)]
    assert all(map(math.isfinite, losses))
