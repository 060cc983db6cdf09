"""The certificate of exact resume: it is given to a run that goes on as if never killed, and to no other."""

from __future__ import annotations

import json
import random
import sys
import textwrap

import pytest

from tests.conftest import ROOT
from tools import resume_check
from tools.resume_check import Leg, check, compare, draw_legs

STEPS, SAMPLES = 16, 64

# A run's files without its training, in milliseconds. `fault` is what is wrong with it: after a restart, or always.
PROGRAM = textwrap.dedent("""
    import json, os, sys, time
    from pathlib import Path

    given = dict(item.lstrip("+").split("=", 1) for item in sys.argv[1:])
    folder, ranks, fault = Path(given["run_dir"]), int(given["trainer.devices"]), given["fault"]
    if fault == "crash":
        sys.exit("no such option")
    if fault == "hang":
        time.sleep(600)
    saved = folder / "last.data.json"
    step = json.loads(saved.read_text())["step"] if saved.exists() else 0
    resumed = step > 0
    for name in ("steps", "keys"):
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\\n") and json.loads(line)["step"] <= step))
    while step < 16:
        step += 1
        keys = [f"s{4 * step + i}" for i in range(4)]
        loss = 1 / step
        if fault == "never" and step == 16:
            keys = keys[1:]
        if resumed:
            keys = {"lost": keys[1:], "doubled": [*keys[1:], "s4"], "order": keys[::-1]}.get(fault, keys)
            loss += {"loss": 1e-3, "bit": 1e-9}.get(fault, 0.0)
        dealt = [keys[rank::ranks] for rank in range(ranks)]
        for name, line in (("steps", {"loss": loss + 1e-7 * (ranks - 1)}), ("keys", {"keys": dealt})):
            with (folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\\n")
        if step % 2 == 0:
            (folder / "part").write_text(json.dumps({"step": step}))
            os.replace(folder / "part", saved)
        time.sleep(0.03)
""")


def certify(folder, *, fault="none", ranks=(1,), kills=3, expected=SAMPLES):
    program = folder / "program.py"
    program.write_text(PROGRAM)
    command = (sys.executable, str(program))
    return check(command, [f"fault={fault}"], folder=folder, ranks=ranks, kills=kills, seed=1, expected=lambda _: expected)


def failed(certificate):
    return {name for name, found in certificate["comparisons"].items() if found["same"] is False}


def test_a_run_that_goes_on_exactly_passes_also_with_another_number_of_ranks(tmp_path):
    certificate = certify(tmp_path, ranks=(1, 2))
    assert certificate["passed"] and not failed(certificate)
    assert [leg["ranks"] for leg in certificate["legs"]] == [1, 2, 1, 2]
    assert [leg["killed"] for leg in certificate["legs"]] == [True, True, True, False]
    assert all(leg["restored_step"] <= leg["last_step"] for leg in certificate["legs"])
    assert certificate["exact_until_step"] == certificate["legs"][1]["restored_step"] < STEPS
    assert json.loads(json.dumps(certificate)) == certificate
    assert "PASSED" in resume_check.table(certificate)


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("lost", {"samples", "order", "each sample once"}),
        ("doubled", {"samples", "order", "each sample once"}),
        ("order", {"order"}),
        ("loss", {"losses"}),
        ("bit", {"losses"}),
        ("never", {"each sample once"}),  # both runs leave it out: only the tars know
    ],
)
def test_what_is_broken_is_named(tmp_path, fault, found):
    certificate = certify(tmp_path, fault=fault)
    assert not certificate["passed"]
    assert failed(certificate) == found
    assert "FAILED" in resume_check.table(certificate)


def test_rounding_is_forgiven_only_after_the_ranks_have_changed():
    one, two = ({step: {"loss": loss, "keys": [["a"]]} for step in (1, 2, 3)} for loss in (1.0, 1.0 + 1e-7))
    assert compare(one, two, exact_until=0)["losses"]["same"]
    assert compare(one, two, exact_until=2)["losses"]["differ"] == [1, 2]


def test_a_run_that_was_never_killed_certifies_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(resume_check, "draw_legs", lambda *_, **__: [Leg(1, 0, 2, kill_step=100)])
    certificate = certify(tmp_path, kills=1)
    assert failed(certificate) == {"kills"}


def test_a_run_that_fails_or_hangs_is_reported_and_leaves_no_process(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="exit code 1:\nno such option"):
        certify(tmp_path, fault="crash")
    monkeypatch.setattr(resume_check, "PATIENCE", 0.3)
    with pytest.raises(RuntimeError, match="the run hangs"):
        certify(tmp_path, fault="hang")


def test_every_start_has_other_workers_and_prefetch_than_the_one_before():
    legs = draw_legs(random.Random(0), steps=50, ranks=[1, 2], kills=8)
    assert len(legs) == 9
    assert sorted(leg.kill_step for leg in legs[:-1]) == [leg.kill_step for leg in legs[:-1]]
    assert legs[-1].kill_step is None
    for one, next_one in zip([Leg(1, 0, 2, None), *legs], legs, strict=False):
        assert one.workers != next_one.workers and one.prefetch != next_one.prefetch


SMALL = ["data.train=[samples/train/shard-000004.tar]", "global_batch=2", "--kills", "1"]


@pytest.mark.slow
def test_a_real_run_passes_on_one_rank_and_two(tmp_path):
    assert resume_check.main([*SMALL, "--ranks", "1,2", "--out", str(tmp_path / "certificate.json")]) == 0
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["comparisons"]["each sample once"] == {"same": True, "shown": 260, "expected": 260, "times": [1]}


@pytest.mark.slow
def test_a_real_run_whose_data_position_is_gone_from_the_checkpoint_fails(tmp_path, monkeypatch, capsys):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import runpy, sys
            from pathlib import Path
            import torch

            sys.path.insert(0, {str(ROOT)!r})
            file = Path(next(item for item in sys.argv if item.startswith("run_dir=")).removeprefix("run_dir=")) / "last.ckpt"
            if file.exists():
                checkpoint = torch.load(file, weights_only=True)
                del checkpoint["ShardDataModule"]
                torch.save(checkpoint, file)
            runpy.run_module("infimed.train", run_name="__main__")
        """)
    )
    monkeypatch.setattr(resume_check, "TRAIN", (sys.executable, str(program)))
    assert resume_check.main(SMALL) == 1
    printed = capsys.readouterr().out
    assert "samples           DIFFERENT" in printed
    assert "each sample once  DIFFERENT" in printed
