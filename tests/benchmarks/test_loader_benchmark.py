from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "loader.py"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import loader

        yield loader
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def tars(benchmark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    benchmark.loader_cases.make(folder, shards=2, rows=40, side=64)
    return folder


@pytest.mark.parametrize("part", ["read", "workers", "decode"])
def test_every_case_of_a_part_sees_each_sample_once_and_the_same_bytes(benchmark, tars, part):
    found = [{"case": case, **benchmark.measure(part, case, tars)} for case in benchmark.GROUPS[part]]
    benchmark.agree(found)
    assert {one["samples"] for one in found} == {80}
    assert all(one["cpu_s"] > 0 and one["wall_s"] > 0 for one in found)


def test_cases_that_saw_different_samples_are_not_compared(benchmark):
    good = {"case": "webdataset", "samples": 80, "bytes": 1000}
    with pytest.raises(AssertionError, match="79"):
        benchmark.agree([good, {**good, "case": "ours", "samples": 79}])


def test_the_table_takes_the_least_cpu_time_and_the_median_rate_and_names_what_was_not_run(benchmark):
    def run(case: str, cpu: float, wall: float) -> dict:
        return {"case": case, "samples": 100, "bytes": 1, "cpu_s": cpu, "wall_s": wall}

    slow, fast = [run("webdataset", cpu, wall) for cpu, wall in ((0.02, 1), (0.01, 4), (0.03, 2))], [run("ours", 0.0025, 0.5)]
    lines = benchmark.table("read", [*slow, *fast, {"case": "litdata", "skipped": "ModuleNotFoundError"}]).splitlines()
    assert lines[2:] == [
        "| webdataset | 100 | 1.00 | 50 | 1.00 |",
        "| ours | 25 | 4.00 | 200 | 4.00 |",
        "| litdata | not run: ModuleNotFoundError | | | |",
    ]


def test_training_goes_on_at_a_position_that_was_written_down(benchmark, tmp_path):
    benchmark.loader_long.make_resume(tmp_path / "set", shards=20, rows=40, position=600)
    found = benchmark.loader_long.run_resume(tmp_path / "set")
    assert (found["samples"], found["shards"]) == (800, 20)
    assert found["open_s"] > 0 and found["batch_s"] > 0


@pytest.mark.slow
def test_the_script_prints_a_line_a_run_and_a_table(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--parts=memory", f"--folder={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    (found,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert found["samples"] == 400
    assert "CPU; GPU not measured" in output and "| 400 |" in output
