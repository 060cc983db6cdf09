"""Every experiment composes, resolves and fits the signatures of what it builds; mistakes get one clear line."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from infimed.config import bind, nearest, stages
from infimed.contracts import UserError
from tests.conftest import ROOT
from tests.training.support import SINGLE, configured, tiny

EXPERIMENTS = sorted(p.stem for p in (ROOT / "conf" / "experiment").glob("*.yaml"))
MODELS = ("infimed_1_7b", "infimed_4b")


def test_all_published_stages_and_the_quickstart_exist():
    assert set(EXPERIMENTS) >= {*SINGLE, "quickstart"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("experiment", SINGLE)
def test_a_published_stage_binds_and_names_every_file_that_is_missing(experiment, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        stages(configured([f"experiment={experiment}", f"model={model}"]))
    said = str(error.value)
    assert "hf download google/siglip-so400m-patch14-384 --local-dir weights/siglip-so400m-patch14-384" in said
    assert "hf download Qwen/Qwen3-1.7B --local-dir weights/Qwen3-1.7B" in said
    assert f"shards/{experiment}/train, which does not exist: make shards with `python tools/make_shards.py" in said
    assert ("init_from is not set" in said) == (experiment != "pretrain")
    assert "no such option" not in said


def test_the_recipe_reaches_the_stages():
    for name, grid, rate, batch in (("pretrain", 12, 5e-5, 256), ("sft_stage1", 27, 2e-5, 128), ("sft_stage2", 27, 1e-5, 128)):
        config = configured([f"experiment={name}"])
        assert (config.resolution.visual_grid, config.system.lr, config.global_batch, config.name) == (grid, rate, batch, name)
        assert config.data.max_tokens == 4096
        assert config.model.projector.visual_grid == grid


def test_the_quickstart_is_the_recipes_chain_low_grid_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    chain = stages(configured(["experiment=quickstart", "run_dir=logs/never"]))
    assert [s.name for s in chain] == list(SINGLE)
    grids = [s.model["projector"]["visual_grid"] for s in chain]
    assert grids == sorted(grids)
    assert grids[0] < grids[-1]
    assert [s.data["resolution"]["visual_grid"] for s in chain] == grids
    for before, after in pairwise(chain):
        assert after.init_from == f"{before.folder}/last.ckpt"


def test_a_swept_learning_rate_reaches_every_stage_of_the_quickstart(monkeypatch):
    monkeypatch.chdir(ROOT)
    chain = stages(configured(["experiment=quickstart", "system.lr=3e-4", "run_dir=logs/never"]))
    assert {s.system["lr"] for s in chain} == {3e-4}


def mistakes(tmp_path: Path, *extra: str) -> str:
    with pytest.raises(UserError) as error:
        stages(configured(tiny(tmp_path, tmp_path / "run", "data.train=[]", "data.val=[]", *extra)))
    return str(error.value)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("+data.max_token=9", "data.max_token: ShardDataModule has no such option; did you mean `max_tokens`?"),
        ("data.max_tokens=many", "data.max_tokens='many': expected int"),
        ("+sede=1", "there is no option `sede`; did you mean `seed`?"),
        ("system._target_=infimed.training.module.Trainer", "cannot be imported"),
        ("+stages={a: {sytem: {lr: 1}}}", "there is no option `sytem`; did you mean `system`?"),
        ("+stages={a: {system: {lrr: 1}}}", "system.lrr: TrainModule has no such option"),
        ("max_steps=abc", "max_steps='abc': expected int | None"),
        ("max_steps=0", "max_steps=0: expected at least 1"),
        ("resolution.visual_grid=99", "resolution.visual_grid=99: expected 1 to 4; the tower's own grid is 4 x 4 (28 px in patches of 7)"),
        ("init_from=nowhere.ckpt", "init_from=nowhere.ckpt does not exist"),
        ("tokenizer=nowhere", "tokenizer=nowhere: no tokenizer.json there"),
    ],
)
def test_a_mistake_names_the_option_and_the_fix(tmp_path, extra, said):
    assert said in mistakes(tmp_path, extra)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("data.mixture=abc", "data.mixture='abc': expected {name: float} | None"),
        ("data.shares=[a,b]", "data.shares=['a', 'b']: expected {name: float} | None"),
        ("data.max_passes=abc", "data.max_passes='abc': expected float | {name: float} | None"),
        ("data.curriculum=5", "data.curriculum=5: expected [{name: object}, ...] | None"),
        ("data.select=abc", "data.select='abc': expected {name: [str, ...]} | None"),
        ("data.only=abc", "data.only='abc': expected [str | Path, ...] | None"),
        ("system.trainable=projector", "system.trainable='projector': expected [str, ...]"),
    ],
)
def test_lists_and_mappings_are_checked(tmp_path, extra, said):
    assert said in mistakes(tmp_path, extra)


def test_remote_shards_are_looked_at_when_they_are_opened(tmp_path):
    stages(configured(tiny(tmp_path, tmp_path / "run", "data.train=['s3://bucket/train']", "data.val=[]")))


def test_limits_of_faults_are_options():
    assert configured(["experiment=quickstart", "data.max_fault_rate=0.1", "data.min_seen=9", "data.max_faults_in_a_row=5"])


def test_all_mistakes_come_at_once(tmp_path):
    said = mistakes(tmp_path, "tokenizer=nowhere", "max_steps=null", "data.epochs=null", "global_batch=3", "data.packs_per_batch=2")
    assert len(said.splitlines()) == 3
    assert "training has no end" in said
    assert "global_batch=3 is not a positive multiple of data.packs_per_batch=2" in said


def test_resume_from_nowhere_or_from_a_folder_without_a_checkpoint_is_refused(tmp_path):
    assert "resume_from=nowhere does not exist" in mistakes(tmp_path, "resume_from=nowhere")
    assert "holds nothing to go on from: expected last.ckpt" in mistakes(tmp_path, f"resume_from={tmp_path}")
    assert "expected 1_a/last.ckpt" in mistakes(tmp_path, f"resume_from={tmp_path}", "+stages={a: {max_steps: 1}}")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{shards: [nowhere], train: []}", "evaluation.shards names nowhere, which does not exist"),
        ("{shards: [], train: [], limit: 0}", "evaluation.limit=0: expected at least 1"),
        ("{shards: [], train: [], limit: abc}", "evaluation.limit='abc': expected int | None"),
        ("{shards: [], train: [], limt: 3}", "evaluation.limt: Evaluation has no such option; did you mean `limit`?"),
    ],
)
def test_the_evaluation_is_checked_before_anything_is_trained(tmp_path, section, said):
    assert said in mistakes(tmp_path, f"evaluation={section}")


def test_shards_may_be_absolute_patterns_and_must_be_a_list(tmp_path):
    (tmp_path / "a.tar").touch()
    stages(configured(tiny(tmp_path, tmp_path / "run", f"data.train=['{tmp_path}/*.tar']", "data.val=[]")))
    assert "data.val=nowhere: expected a list" in mistakes(tmp_path, "data.val=nowhere")


def test_no_experiment_is_said_and_open_dictionaries_take_new_keys(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"tokenizer=None: expected str; no experiment is chosen; try experiment=quickstart"):
        stages(configured([]))
    (stage, *_) = stages(configured(["experiment=quickstart", "~stages", "data.select={source: [easyvqa]}", "data.mixture={easyvqa: 2.0}"]))
    assert (stage.data["select"], stage.data["mixture"]) == ({"source": ["easyvqa"]}, {"easyvqa": 2.0})


def test_bind_looks_inside_lists_and_at_missing_arguments():
    node = OmegaConf.create({"items": [{"_target_": "infimed.training.freezing.set_trainable", "componets": []}]})
    said = bind(OmegaConf.to_container(node), "root")
    assert said[0] == "root.items[0].componets: set_trainable has no such option; did you mean `components`?"
    assert "root.items[0].components is not set; set_trainable needs it" in said


def test_nearest_lists_everything_when_nothing_is_near():
    assert nearest("zzz", ["one", "two"]) == "; valid: one, two"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["experiment=quick-start"], "experiment=quick-start does not exist; did you mean `quickstart`?"),
        (["experiment=quickstart", "system.lrr=1"], "there is no option `system.lrr`; did you mean `system.lr`?"),
        (["experiment=sft_stage2", "weights.vision=nowhere"], "weights.vision=nowhere holds no safetensors weights; get them with"),
        (["experiment=quickstart", "~stages", "system.trainable=[visoin]", "max_steps=1"], "expected one or more of vision, projector"),
        (["experiment=quickstart", "max_steps=5"], "stage pretrain sets max_steps itself; write stages.pretrain.max_steps="),
    ],
)
def test_on_the_command_line_a_mistake_exits_2_without_a_trace(tmp_path, arguments, said):
    result = subprocess.run(
        [sys.executable, "-m", "infimed.train", *arguments, f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("model", sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")))
def test_every_model_file_binds_to_what_it_builds(model):
    overrides = ["experiment=any_pretrain" if model.startswith("any") else "experiment=pretrain", f"model={model}"]
    if model == "tiny":
        overrides.append("resolution.visual_grid=8")
    with pytest.raises(UserError) as error:
        stages(configured(overrides))
    missing = ("holds no safetensors weights", "does not exist: make shards", "no tokenizer.json there")
    assert all(any(part in line for part in missing) for line in str(error.value).splitlines())
