"""The main job: every experiment trains and resumes; what is interrupted goes on bit for bit; the loss is exact however it is cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infimed.contracts import UserError
from infimed.data.plan import Plan
from infimed.data.shards import open_shards
from tests.conftest import ROOT
from tests.training.support import SINGLE, run, run_and_cut, steps_of, tiny


def weights_of(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture
def pretrained(tiny_shards):
    run(tiny(tiny_shards, tiny_shards / "first", steps=1))
    return tiny_shards / "first" / "last.ckpt"


@pytest.mark.parametrize("experiment", SINGLE)
def test_every_stage_trains_two_steps_and_resumes_to_four_as_if_never_stopped(tiny_shards, pretrained, experiment):
    start = [] if experiment == "pretrain" else [f"init_from={pretrained}"]
    straight, stopped = tiny_shards / "straight", tiny_shards / "stopped"
    run(tiny(tiny_shards, straight, *start, experiment=experiment))
    run_and_cut(tiny(tiny_shards, stopped, *start, experiment=experiment), step=2)
    assert len(steps_of(stopped)) == 2
    run(tiny(tiny_shards, stopped, *start, experiment=experiment))
    assert steps_of(stopped) == steps_of(straight)
    expected = weights_of(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(stopped).items())


def test_each_stage_starts_from_the_last_ones_weights(tiny_shards):
    overrides = tiny(
        tiny_shards, tiny_shards / "chain", "+stages={low: {max_steps: 2}, high: {max_steps: 1, resolution: {visual_grid: 4}}}"
    )
    run(overrides)
    stored = torch.load(tiny_shards / "chain" / "2_high" / "last.ckpt", weights_only=True)["infimed"]["config"]
    assert stored["init_from"].endswith("1_low/last.ckpt")
    assert stored["model"]["projector"]["visual_grid"] == 4
    assert (tiny_shards / "chain" / "last.ckpt").resolve() == tiny_shards / "chain" / "2_high" / "last.ckpt"
    before = (tiny_shards / "chain" / "1_low" / "last.ckpt").stat().st_mtime_ns
    run(overrides)  # finished stages are skipped
    assert (tiny_shards / "chain" / "1_low" / "last.ckpt").stat().st_mtime_ns == before


def test_init_from_takes_weights_only_and_resume_from_takes_everything(tiny_shards, pretrained):
    run(tiny(tiny_shards, tiny_shards / "again", f"init_from={pretrained}", steps=2))
    assert [line["step"] for line in steps_of(tiny_shards / "again")] == [1, 2]
    run_and_cut(tiny(tiny_shards, tiny_shards / "stopped"), step=2)
    run(tiny(tiny_shards, tiny_shards / "unused", f"resume_from={tiny_shards / 'stopped' / 'last.ckpt'}"))
    assert [line["step"] for line in steps_of(tiny_shards / "stopped")] == [1, 2, 3, 4]


def test_the_same_global_batch_cut_in_any_way_takes_the_same_steps(tiny_shards):
    """Four rows a step as 4 x 1, 2 x 2 and 1 x 4 (micro-batches x rows): a mean of means would differ in the second digit."""
    losses, weights, norms = [], [], []
    for rows in (1, 2, 4):
        folder = tiny_shards / f"rows{rows}"
        run(tiny(tiny_shards, folder, "global_batch=4", f"data.packs_per_batch={rows}", "data.epochs=null", "system.log_every=1", steps=3))
        events = EventAccumulator(str(folder)).Reload()
        norms.append([e.value for e in events.Scalars("optim/grad_norm_language")])
        losses.append([line["loss"] for line in steps_of(folder)])
        weights.append(weights_of(folder))
    for loss, weight, norm in zip(losses[1:], weights[1:], norms[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        assert norm == pytest.approx(norms[0], rel=1e-4)  # AdamW alone would hide a wrong scale
        assert all((value - weights[0][name]).abs().max() < 1e-5 for name, value in weight.items())


def test_a_resumed_run_knows_its_length_without_planning_all_of_it_again(tiny_shards, monkeypatch):
    overrides = tiny(tiny_shards, tiny_shards / "run")
    run_and_cut(overrides, step=2)
    known, length = [], Plan.__len__

    def noted(plan):
        known.extend([plan._total is not None] if plan.steps is not None else [])  # of training, not of validation
        return length(plan)

    monkeypatch.setattr(Plan, "__len__", noted)
    run(overrides)
    assert known
    assert all(known)


def test_resume_goes_on_through_a_link_and_refuses_other_options(tiny_shards):
    folder = tiny_shards / "runs" / "one"
    run(tiny(tiny_shards, tiny_shards / "straight"))
    run_and_cut(tiny(tiny_shards, folder), step=2)
    (folder.parent / "mine").symlink_to("one")
    with pytest.raises(UserError, match=r"system\.lr: 0\.001 then, 0\.01 now"):
        run(tiny(tiny_shards, folder, "system.lr=1e-2"))
    with pytest.raises(UserError, match=r"model\.language\.num_hidden_layers: 2 then, 1 now"):
        run(tiny(tiny_shards, folder, "model.language.num_hidden_layers=1"))
    run(tiny(tiny_shards, tiny_shards / "unused", f"resume_from={folder.parent / 'mine'}"))
    assert steps_of(folder) == steps_of(tiny_shards / "straight")
    assert (folder.parent / "latest.ckpt").resolve() == folder / "last.ckpt"
    with pytest.raises(UserError, match=r"max_steps: 4 then, 5 now"):
        run(tiny(tiny_shards, folder, steps=5))  # finished runs too


def test_a_run_killed_before_its_last_validation_still_ends_with_a_result(tiny_shards):
    folder = tiny_shards / "run"
    expected = run(tiny(tiny_shards, folder))
    (folder / "done.json").unlink()
    assert run(tiny(tiny_shards, folder)) == pytest.approx(expected)
    assert json.loads((folder / "done.json").read_text())["train_loss"] == steps_of(folder)[-1]["loss"]


def command(shards, folder, *extra):
    return [sys.executable, "-m", "infimed.train", *tiny(shards, folder, "callbacks.checkpoint.every_n_train_steps=1", *extra, steps=12)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_two_ranks_take_the_steps_of_one(tiny_shards):
    one, two = tiny_shards / "one", tiny_shards / "two"
    run(tiny(tiny_shards, one, "global_batch=2", "data.epochs=null", steps=4))
    extra = ("global_batch=2", "data.epochs=null", "trainer.devices=2", "+trainer.strategy=ddp", "max_steps=4")
    subprocess.run([*command(tiny_shards, two), *extra], check=True, cwd=ROOT, env=environment(), timeout=200, capture_output=True)
    assert [line["loss"] for line in steps_of(two)] == pytest.approx([line["loss"] for line in steps_of(one)], rel=1e-5)
    expected = weights_of(one)
    assert all((value - expected[name]).abs().max() < 1e-5 for name, value in weights_of(two).items())


@pytest.mark.slow
def test_a_rank_that_stops_on_faults_ends_the_other_and_says_why(tiny_shards):
    row = open_shards([tiny_shards / "train"]).rows[5]
    with open(row.shard, "r+b") as file:
        file.seek(row.members[-1].offset + 9)
        file.write(b"\xee")
    two_ranks = ("global_batch=2", "data.epochs=null", "trainer.devices=2", "+trainer.strategy=ddp")
    strict = command(tiny_shards, tiny_shards / "run", *two_ranks, "data.max_fault_rate=0", "data.min_seen=1")
    ended = subprocess.run(strict, cwd=ROOT, env=environment(), timeout=150, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "quarantine: 1 of " in ended.stderr
    assert "/checksum: 1)" in ended.stderr


def test_a_sweep_trains_every_point_in_a_folder_of_its_own(tiny_shards):
    overrides = [o for o in tiny(tiny_shards, tiny_shards, steps=1) if not o.startswith(("run_dir=", "system.lr="))]
    sweep = [sys.executable, "-m", "infimed.train", "-m", *overrides, "system.lr=1e-4,3e-4", f"hydra.sweep.dir={tiny_shards / 'sweep'}"]
    subprocess.run(sweep, check=True, cwd=ROOT, env=environment(), timeout=200, capture_output=True)
    rates = [torch.load(tiny_shards / "sweep" / n / "last.ckpt", weights_only=True)["infimed"]["config"]["system"]["lr"] for n in "01"]
    assert rates == [1e-4, 3e-4]
    assert len(steps_of(tiny_shards / "sweep" / "0")) == 1


def test_kill_9_in_mid_epoch_then_the_same_command_gives_the_same_losses_and_samples(tiny_shards):
    killed, straight = tiny_shards / "killed", tiny_shards / "straight"
    run(tiny(tiny_shards, straight, "data.epochs=null", steps=12))
    process = subprocess.Popen(
        command(tiny_shards, killed, "data.epochs=null", "data.num_workers=1"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not ((killed / "steps.jsonl").exists() and len(steps_of_partial(killed)) >= 4 and (killed / "last.ckpt").exists()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "done.json").exists(), "it ended before it was killed"
    run(tiny(tiny_shards, killed, "data.epochs=null", steps=12))  # no workers this time: the stream is the same
    assert steps_of(killed) == steps_of(straight)


def steps_of_partial(folder):
    return [line for line in (folder / "steps.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_a_full_disk_keeps_the_previous_checkpoint(tiny_shards, monkeypatch):
    folder = tiny_shards / "stopped"
    run_and_cut(tiny(tiny_shards, folder), step=2)
    before = (folder / "last.ckpt").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infimed.training.checkpoint.os.fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*previous checkpoint is untouched"):
        run(tiny(tiny_shards, folder))
    assert (folder / "last.ckpt").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_ten_golden_losses(tmp_path):
    """The tiny model on the bundled samples: any change of data order, template, init or maths moves these numbers."""
    folder = tmp_path / "golden"
    overrides = [
        "experiment=quickstart",
        "~stages",
        "evaluation=null",
        "max_steps=10",
        "data.max_tokens=512",
        "resolution.visual_grid=4",
        "data.val=[]",
    ]
    run([*overrides, "system.trainable=[vision,projector,language]", "callbacks.progress.refresh_rate=0", f"run_dir={folder}"])
    found = [line["loss"] for line in steps_of(folder)]
    golden = json.loads((ROOT / "tests" / "golden_losses.json").read_text())
    assert found == pytest.approx(golden, rel=1e-3)  # one and two threads agree to 1e-6; room for other processors
    assert found[-1] < found[0] - 1
