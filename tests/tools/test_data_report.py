from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

from infimed import preview
from infimed.processing.flops import Work, flops
from infimed.train import build_trainer
from tools.data_report import main

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
# A published stage on the bundled samples: its weights, and the stage that it starts from, are not there.
STAGE = (
    *("experiment=sft_stage2", "model=tiny", "trainer=cpu", "data.max_tokens=512", "data.packs_per_batch=2", "resolution.visual_grid=4"),
    *(f"tokenizer={SAMPLES}/tokenizer", f"data.train=[{SAMPLES}/val]", "data.val=[]", "data.num_workers=0", "global_batch=8"),
)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["data_report"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def reported(capsys, *overrides):
    main([*STAGE, *overrides, "--json"])
    return json.loads(capsys.readouterr().out)


def the_stage(*overrides):
    found = []
    preview.run(found.extend, [*STAGE, *overrides])
    return found[0]


@pytest.mark.parametrize("overrides", [(), ("max_steps=5", "data.epochs=null"), ("data.mixture={inia19: 0.5}", "data.epochs=2")])
def test_the_forecast_is_what_training_then_gets(overrides, capsys):
    (survey,) = reported(capsys, *overrides)
    stage = the_stage(*overrides)
    data = instantiate(stage.data)
    data.trainer = build_trainer(stage)
    batches = []
    for batch in data.train_dataloader():
        batches.append(batch)
        data.consumed(batch)
    feed = survey["feed"]
    assert feed["exact"]
    assert feed["micro_steps"] == len(batches)
    assert feed["optimizer_steps"] == -(-len(batches) // 4)
    assert feed["tokens"] == sum(batch.tokens for batch in batches)
    assert feed["visual_tokens"] == sum(batch.visual_tokens for batch in batches)
    assert feed["samples"] == sum(len(batch.keys) for batch in batches)
    trained = stage.system["trainable"]
    true = sum(flops(preview.shape_of_stage(stage), Work.of_batch(batch), trained=trained).total for batch in batches)
    assert feed["flops"] == pytest.approx(true, rel=0.02)  # only what is supervised is estimated


def test_a_batch_on_more_ranks_is_fewer_micro_steps_and_as_many_optimizer_steps(capsys):
    main([*STAGE, "--json", "--world-size", "4"])
    four = json.loads(capsys.readouterr().out)[0]["feed"]
    one = reported(capsys)[0]["feed"]
    assert four["packs"] == one["packs"]
    assert four["optimizer_steps"] == one["optimizer_steps"]
    assert four["micro_steps"] == -(-one["micro_steps"] // 4)


def test_the_text_tells_every_part_and_writes_nothing(capsys):
    main(STAGE)
    shown = capsys.readouterr().out
    for words in (
        "== sft_stage2: rows of 512 tokens",
        "optimizer steps",
        "FLOP",
        "tokens of a sample",
        "longer side of",
        "32,768",
        "inia19",
    ):
        assert words in shown
    assert os.listdir() == []


def test_a_chain_is_reported_stage_by_stage_on_one_page(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(SAMPLES.parent)
    main(["experiment=quickstart", f"--html={tmp_path}/report.html"])
    assert "4 stages" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for stage in ("pretrain", "sft_stage1", "sft_stage2", "sft_stage3"):
        assert f"<h2>{stage}</h2>" in page
    assert page.count("<svg") == 8
    assert "<script" not in page


def test_the_cost_of_a_decoder_of_another_kind_is_read_off_its_folder(capsys, tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config |= {
        "num_key_value_heads": 2,
        "vocab_size": 4000,
        "head_dim": 16,
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
    }
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(config))
    other = [f"weights.language={tmp_path}/decoder", "weights.vision=null", "model=smollm2", "model.projector.out_features=64"]
    stage = the_stage(*other)
    shape = preview.shape_of_stage(stage)
    assert (shape.language.layers, shape.language.width, shape.language.head_dim) == (3, 64, 16)
    assert shape.language.vocab == 49216
    main([*STAGE, *other, "--json"])
    assert json.loads(capsys.readouterr().out)[0]["feed"]["flops"] > 0


def test_the_cost_is_left_open_where_the_configuration_does_not_tell_it(capsys):
    (survey,) = reported(capsys, "+adapters.language={rank: 4, alpha: 8, targets: [q_proj]}")
    assert survey["feed"]["flops"] is None


def test_a_mistake_is_one_clear_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main([*STAGE, "--world-size", "0"])
    assert stop.value.code == 2
    assert "--world-size 0" in capsys.readouterr().err
