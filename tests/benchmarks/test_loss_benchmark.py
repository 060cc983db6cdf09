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
SCRIPT = ROOT / "benchmarks" / "loss.py"
SIZES = {"tokens": 64, "vocab": 300, "width": 16}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("loss_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("supervised", [1.0, 0.4])
def test_every_case_computes_the_same_loss_and_gradients(benchmark, supervised):
    problem = benchmark.problem(**SIZES, supervised=supervised, device="cpu")

    def run(case: str) -> list[torch.Tensor]:
        total = benchmark.CASES[case](*problem)
        return [total.detach(), *torch.autograd.grad(total, problem[:2])]

    expected = run("plain")
    for case in ("transformers", "full", "chunked"):
        for found, value in zip(run(case), expected, strict=True):
            assert torch.allclose(found, value, rtol=1e-5, atol=1e-5), case


def test_cases_that_disagree_are_not_compared(benchmark):
    good = {"case": "plain", "supervised": 1.0, "loss_norm": 9.0, "grad_hidden_norm": 2.0, "grad_weight_norm": 3.0}
    benchmark.check_agreement([good, {**good, "case": "chunked", "loss_norm": 9.01}])
    with pytest.raises(AssertionError, match="grad_weight_norm of chunked"):
        benchmark.check_agreement([good, {**good, "case": "chunked", "grad_weight_norm": 3.1}])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_the_script_measures_every_case_in_a_process_of_its_own_and_prints_a_table():
    options = [f"--{name}={value}" for name, value in SIZES.items()]
    command = [sys.executable, str(SCRIPT), *options, "--supervised=0.4", "--repeats=1", "--cases=plain,chunked"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [line["case"] for line in lines] == ["plain", "chunked"]
    assert all(line["cpu_ms"] > 0 and line["supervised"] == 0.4 for line in lines)
    assert "CPU, 1 thread(s); GPU not measured; torch" in output
    assert "| 40% | plain |" in output and "| 40% | chunked |" in output
