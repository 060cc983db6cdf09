from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
SAME_LOSS = ("B0", "B2", "B2gc", "B3", "B3sac", "O1", "O2")
TINY = ["--device", "cpu", "--models", "tiny"]
SHORT = [*TINY, "--only", "train", "--stages", "s2", "--cases", "B0,B1,B2,B3,O1,O2", "--steps", "1"]


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(SCRIPT.parent))
    yield
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def run():
    return import_module("gpu").main


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "out.jsonl"
    return SimpleNamespace(out=out, code=run([*SHORT, "--out", str(out)]))


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def check_losses(lines: list[dict], cases: tuple[str, ...]) -> None:
    """Measured: at most 1e-6 apart, float32, over all stages of the tiny model."""
    train = [x for x in lines if x["section"] == "train" and x["status"] == "measured"]
    for stage in {x["stage"] for x in train}:
        losses = {x["case"]: x["loss"] for x in train if x["stage"] == stage}
        assert set(cases) <= set(losses)
        assert max(abs(losses[case] - losses["O1"]) for case in cases) < 1e-3, (stage, losses)


def test_baselines_and_ours_compute_the_same_loss_on_the_same_samples(first):
    assert first.code == 0
    check_losses(lines_of(first.out), ("B0", "B2", "B3", "O1", "O2"))


def test_ours_runs_before_and_after_the_others(first):
    cases = [(x["case"], x["round"]) for x in lines_of(first.out)]
    assert cases == [("O1", 1), ("B0", 1), ("B1", 1), ("B2", 1), ("B3", 1), ("O2", 1), ("O1", 2)]


def test_real_tokens_alone_are_counted(first):
    lines = {x["case"]: x for x in lines_of(first.out)}
    for case in ("B0", "O1"):  # 4 documents of 64 tokens in the mean, one step
        assert lines[case]["tokens_s"] * lines[case]["step_ms"] / 1e3 == pytest.approx(256)
        assert lines[case]["images_s"] * lines[case]["step_ms"] / 1e3 == pytest.approx(4)
    assert lines["B0"]["pad"] > 0.2 > lines["O1"]["pad"]  # measured: 0.28 and 0


def test_a_second_call_measures_nothing_again_and_still_draws_the_table(first, run, capsys):
    before = first.out.read_text()
    assert run([*SHORT, "--out", str(first.out)]) == 0
    assert first.out.read_text() == before
    assert "### tiny s2" in capsys.readouterr().out


def test_other_settings_are_measured_anew(first, run, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text(first.out.read_text())
    run([*SHORT, "--out", str(out), "--spread", "0", "--cases", "O1"])
    assert [x["settings"]["spread"] for x in lines_of(out)] == [0.4] * 7 + [0.0]


def test_no_budget_measures_nothing_and_says_so(run, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run([*TINY, "--out", str(out), "--budget", "0"]) == 0
    printed = capsys.readouterr().out
    assert not out.exists()
    assert "nothing was measured" in printed
    assert "not measured, for the budget: ceilings product" in printed
    assert "train tiny s2 B0 1" in printed
    assert "| 4b text: honest MFU of 989 | >= 58% | not measured |" in printed


def test_cases_that_disagree_are_reported_and_end_in_exit_code_1(first, run, tmp_path, capsys):
    out, lines = tmp_path / "out.jsonl", lines_of(first.out)
    for line in lines:
        line["loss"] += 0.01 * (line["case"] in ("B2", "B1"))
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run([*SHORT, "--out", str(out), "--budget", "0"]) == 1
    printed = capsys.readouterr().out
    assert "DISAGREE: train tiny s2 B2" in printed
    assert "DISAGREE: train tiny s2 B1" not in printed  # leaks across documents by design


def test_a_case_that_crashes_is_written_down_and_the_next_ones_run(run, tmp_path, monkeypatch, capsys):
    def crash(world):
        raise RuntimeError("broken kernel")

    monkeypatch.setitem(import_module("gpu_baselines").BASELINES, "B2", crash)
    out = tmp_path / "out.jsonl"
    assert run([*SHORT, "--out", str(out), "--cases", "B2,B1"]) == 1
    assert [(x["case"], x["status"]) for x in lines_of(out)] == [("B2", "failed"), ("B1", "measured"), ("B2", "failed")]
    assert "failed: train tiny s2 B2: RuntimeError: broken kernel" in capsys.readouterr().out


def test_a_line_cut_off_by_a_kill_is_left_out(first, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text(first.out.read_text()[:-40])
    assert len(import_module("gpu_tables").read(out)) == 6


def test_an_unknown_case_is_refused_with_the_choices(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(["--cases", "B9", "--out", str(tmp_path / "x")])
    assert "--cases B9: expected some of B0,B1,B2" in capsys.readouterr().err


def test_a_late_case_is_cut_short_but_not_below_three_steps():
    meter = import_module("gpu_loops").Meter(torch.device("cpu"), warmup=2, steps=10, deadline=0.0, thorough=True)
    assert [meter.after_step() for _ in range(5)] == [False] * 4 + [True]
    assert meter.steps == 3


def test_memory_run_out_halves_the_micro_batches_down_to_a_document(run, tmp_path, monkeypatch):
    loops, seen = import_module("gpu_loops"), []

    def small_device(loop, meter):
        seen.append(loop.micro_batches)
        if loop.micro_batches < 4:
            raise torch.OutOfMemoryError("too much")
        return kept(loop, meter)

    kept = loops.RawLoop.run
    monkeypatch.setattr(loops.RawLoop, "run", small_device)
    out = tmp_path / "out.jsonl"
    assert run([*SHORT, "--out", str(out), "--cases", "B0"]) == 0
    assert seen == [1, 2, 4]
    split = lines_of(out)[0]
    assert split["micro_batches"] == 4
    assert split["pad"] == 0


def test_annotations_in_a_profile_are_not_counted_as_kernels():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(key="nvjet_tst_128x256", device_type=cuda, self_device_time_total=4000.0, count=2, is_user_annotation=False),
        SimpleNamespace(key="flash_fwd_kernel", device_type=cuda, self_device_time_total=2000.0, count=2, is_user_annotation=False),
        SimpleNamespace(key="Optimizer.step", device_type=cuda, self_device_time_total=9000.0, count=2, is_user_annotation=True),
        SimpleNamespace(key="aten::mm", device_type=cpu, self_device_time_total=4000.0, count=2, is_user_annotation=False),
        SimpleNamespace(key="cudaLaunchKernel", device_type=cpu, self_device_time_total=0.0, count=6, is_user_annotation=False),
    ]
    found = import_module("gpu_loops").read_profile(events, steps=2)
    assert found["kernel_ms"] == {"attention": 1.0, "products": 2.0, "optimizer": 0.0, "other": 0.0}
    assert found["launches"] == 3


@pytest.mark.parametrize("model", ["1.7b", "4b"])
def test_sizes_are_those_of_the_published_models(model):
    flops, cases = import_module("infimed.processing.flops"), import_module("gpu_cases")
    parameters = flops.shape_of(cases.sizes_of(model)).language.parameters
    assert parameters == {"1.7b": 1_720_574_976, "4b": 4_022_468_096}[model]


@pytest.mark.slow
def test_the_whole_script_runs_on_a_cpu(tmp_path):
    out = tmp_path / "out.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *TINY, "--stages", "s1,s2,sft,sft729,text", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = lines_of(out)
    assert {x["section"] for x in lines} == {"ceilings", "attention", "loss", "train"}
    assert all(x["status"] in ("measured", "skipped") for x in lines)
    check_losses(lines, SAME_LOSS)
    assert "skipped: train tiny s1 O3: fp8 needs" in done.stdout
    assert done.stdout.rstrip().endswith("| each model each stage: syncs of O2 | 0 | not measured |")
    errors = [x["error"] for x in lines if x["section"] == "attention" and x["status"] == "measured"]
    assert max(errors) < 1e-5  # float32 against float64; measured at most 5e-7
