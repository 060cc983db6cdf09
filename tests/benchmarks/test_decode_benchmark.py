from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "decode.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("decode_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*options: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, str(SCRIPT), *options], check=True, capture_output=True, text=True, env=environment).stdout


def test_every_way_sees_the_same_picture_and_times_of_others_are_refused(benchmark):
    data, resolution = benchmark.files()["grey PNG 512 x 512 to a square"]
    found = {way: read(data, resolution) for way, read in benchmark.WAYS.items()}
    benchmark.check_agreement(found, resolution)
    for way, wrong in (("pillow", 1), ("ours", 3)):
        with pytest.raises(AssertionError, match=f"{way} is [1-4]/255 from plain"):
            benchmark.check_agreement({**found, way: (found[way].int() + wrong).clamp(0, 255)}, resolution)


def test_the_script_times_every_picture_in_every_way_and_prints_a_table(benchmark):
    output = run("--repeats=1")
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [line["picture"] for line in lines] == list(benchmark.files())
    assert all(line[way] > 0 for line in lines for way in ("plain", "pillow", "ours"))
    assert f"torch {torch.__version__}" in output
    assert output.count("\n| ") == 1 + len(lines)


def test_the_script_counts_values_that_the_fast_resize_rounds_otherwise():
    lines = [json.loads(line) for line in run("--apart=0.1").splitlines()]
    assert {line["resize"] for line in lines} == {"bicubic", "bilinear"}
    assert len({line["pattern"] for line in lines}) == len(lines) // 2 == 5
    for line in lines:
        assert line["values"] > 0
        assert set(line["share_off_by"]) <= {"1/255", "2/255"}
