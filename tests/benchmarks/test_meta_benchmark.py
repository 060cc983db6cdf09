from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_4b_model_is_built_wrapped_and_planned_within_four_gib():
    command = [sys.executable, str(ROOT / "benchmarks" / "meta.py"), "--models=infimed_4b", "--repeats=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    (found,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert found["parameters"] == 397_745_440 + 9_507_840 + 4_022_468_096  # tower of 26 blocks, projector, Qwen3-4B
    assert 0.1 < found["peak_gib"] < 4  # seen: 0.38, nearly all of it the libraries
    assert found["fill"] > 0.999
    assert found["stages"]["sft_stage2"]["tflop"] > found["stages"]["pretrain"]["tflop"] > 0
    assert "| infimed_4b | 4,429,721,376 |" in output
