"""The evaluation entry point, on a checkpoint that a short training run left."""

from __future__ import annotations

import json

import pytest
import torch

from infimed import evaluate
from infimed.contracts import UserError
from infimed.models.weights import read_checkpoint
from tests.conftest import write_squares
from tests.training.support import configured, run, tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    folder = write_squares(tmp_path_factory.mktemp("squares"))
    learn = ("data.epochs=null", "system.trainable=[vision,projector,language]", "system.lr=3e-3")
    run(tiny(folder, folder / "run", *learn, steps=150))
    return folder


def questions(shards) -> list[str]:
    return [
        "experiment=quickstart",
        f"evaluation.shards=[{shards / 'test'}]",
        f"evaluation.train=[{shards / 'train'}]",
        f"ckpt={shards / 'run' / 'last'}",
        f"run_dir={shards / 'scores'}",
    ]


def test_evaluate_writes_one_table_and_every_prediction(trained, capsys):
    accuracy = evaluate.main(configured(questions(trained), "evaluate"))
    shown = capsys.readouterr().out
    assert "in / colour" in shown
    assert "learned" in shown
    lines = [json.loads(line) for line in (trained / "scores" / "model" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    assert accuracy == pytest.approx(sum(line["correct"] for line in lines) / 18)
    rows = {(row["grouping"], row["group"]): row for row in json.loads((trained / "scores" / "table.json").read_text())["rows"]}
    overall = rows["overall", "all"]
    assert overall["n"] == 18
    assert overall["accuracy"]["low"] <= accuracy <= overall["accuracy"]["high"]
    assert (trained / "scores" / "table.md").read_text().startswith("|")
    before = (trained / "scores" / "model" / "predictions.jsonl").read_bytes()
    evaluate.main(configured(questions(trained), "evaluate"))  # nothing is asked again
    assert (trained / "scores" / "model" / "predictions.jsonl").read_bytes() == before


def test_evaluate_says_what_it_needs(trained):
    with pytest.raises(UserError, match="ckpt is not set"):
        evaluate.main(configured(questions(trained)[:-2], "evaluate"))
    with pytest.raises(UserError, match="choose an experiment that has test questions"):
        evaluate.main(configured([f"ckpt={trained / 'run'}", f"run_dir={trained}"], "evaluate"))


def test_the_model_is_rebuilt_from_the_checkpoint_alone(trained):
    model, tokenizer, digest = evaluate.load_model(str(trained / "run"))
    config = read_checkpoint(trained / "run" / "last.ckpt")["infimed"]["config"]
    assert model.resolution.visual_grid == config["data"]["resolution"]["visual_grid"] == 2
    assert model.resolution.image_size == 28
    assert not model.training
    assert tokenizer.image_id == model.image_token_id
    assert len(digest) == 12


def rewritten(trained, name, **changes):
    stored = read_checkpoint(trained / "run" / "last.ckpt")
    stored["infimed"] = {**stored["infimed"], **changes}
    torch.save(stored, trained / name)
    return str(trained / name)


def test_a_checkpoint_cannot_choose_what_code_runs(trained):
    config = read_checkpoint(trained / "run" / "last.ckpt")["infimed"]["config"]
    for target in ("torch.load", "infimed.models.weights.torch.load"):
        model = {**config["model"], "vision": {"_target_": target, "f": "x.pkl", "weights_only": False}}
        with pytest.raises(UserError, match=f"asks to run {target}"):
            evaluate.load_model(rewritten(trained, "evil.ckpt", config={**config, "model": model}))


def test_a_checkpoint_of_another_tokenizer_is_refused(trained):
    with pytest.raises(UserError, match="trained with another tokenizer or chat template"):
        evaluate.load_model(rewritten(trained, "other.ckpt", tokenizer="0123456789abcdef"))
