from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def load(monkeypatch):
    """Load a script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("images", [False, True])
def test_every_way_computes_the_loss_and_gradients_of_the_same_samples(load, images):
    training = load("training")
    language = training.build("tiny").train()
    drawn = training.draw(np.array([[9, 20], [5, 33], [30, 11], [7, 7], [12, 25]]), language, images=images)
    found = {}
    for name, way in training.WAYS.items():
        language.set_attn_implementation("infimed_packed" if way.packed else "sdpa")
        see = training.tower.See(packed=way.packed, out_features=128) if images else torch.nn.Identity()
        language.zero_grad()
        loss = 0.0
        for group in training.cut(drawn, way, max_tokens=80):
            part = training.loss_of(language, way, training.tensors(group, way), supervised=63, see=see)
            part.backward()
            loss += float(part.detach())
        learning = dict(torch.nn.ModuleList([language, see]).named_parameters())
        found[name] = (loss, torch.cat([learning[key].grad.flatten() for key in sorted(learning)]))
    for loss, gradient in found.values():
        assert loss == pytest.approx(found["padded"][0], abs=1e-5)  # worst seen: 1e-6
        assert (gradient - found["padded"][1]).norm() < 1e-5 * gradient.norm()  # worst seen: 1e-6


def test_packed_rows_hold_every_sample_once_and_no_padding(load):
    training = load("training")
    drawn = training.draw(training.MIXES["caption"](12), training.build("tiny"))
    rows = training.cut(drawn, training.WAYS["packed"], max_tokens=2048)
    assert sorted(id(s) for row in rows for s in row) == sorted(id(s) for s in drawn)
    assert all(sum(len(s.ids) for s in row) <= 2048 for row in rows)
    laid = [training.tensors(row, training.WAYS["packed"])["ids"].numel() for row in rows]
    assert sum(laid) == sum(len(s.ids) for s in drawn)


def test_the_samples_chosen_are_padded_as_the_whole_mix_is(load):
    training = load("training")
    for count in (8, 64):
        lengths, facts = training.choose("caption", count)
        assert len(lengths) == count
        assert abs(facts["real_share"] - facts["real_share_of_stream"]) < 0.002
        assert facts["tokens"] == lengths.sum() + 10 * count


def test_cases_that_disagree_are_not_compared(load):
    training = load("training")
    good = {"case": "padded", "loss": 2.0, "grad_norm": 3.0}
    training.check_agreement([good, {**good, "case": "packed", "loss": 2.00005}])
    with pytest.raises(AssertionError, match="loss of packed"):
        training.check_agreement([good, {**good, "case": "packed", "loss": 2.0002}])
    with pytest.raises(AssertionError, match="gradient of packed"):
        training.check_agreement([good, {**good, "case": "packed", "grad_norm": 3.01}])


def run(module: ModuleType, monkeypatch, capsys, *options: str) -> tuple[list[dict], str]:
    monkeypatch.setattr(sys, "argv", ["benchmark", *options])
    module.main()
    output = capsys.readouterr().out
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], output


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_case_is_measured_in_a_process_of_its_own(load, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    file = tmp_path / "lines.jsonl"
    lines, output = run(load("training"), monkeypatch, capsys, "--samples=2", "--repeats=1", "--cases=packed", f"--json={file}")
    assert lines == [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0]["slots"] == lines[0]["tokens"] and lines[0]["cpu_s"] > 0 and lines[0]["peak_mib"] >= lines[0]["start_mib"]
    assert "| packed | 1.00 |" in output and "1 thread(s); torch" in output


def test_ratios_are_medians_to_the_first_case(load):
    base = {"tokens": 100, "slots": 200, "peak_mib": 1.0}
    runs = [{**base, "case": "padded", "cpu_s": cpu, "wall_s": 10.0} for cpu in (4.0, 6.0, 50.0)]
    runs += [{**base, "case": "packed", "slots": 100, "cpu_s": 2.0, "wall_s": wall} for wall in (4.0, 4.0, 1.0)]
    rows = load("training").table(runs).splitlines()
    assert rows[2].startswith("| padded | 1.00 | 1.00 | 17 | 10 |")
    assert rows[3].startswith("| packed | 3.00 | 2.50 | 50 | 25 |")


def test_attention_is_compared_only_where_it_agrees(load, monkeypatch, capsys):
    attention = load("attention")
    expected = (torch.randn(4, 2, 8),)
    attention.check(expected, expected, case="packed")
    with pytest.raises(AssertionError, match="packed differs"):
        attention.check((expected[0] + 0.01,), expected, case="packed")
    assert sum(attention.documents("caption")) == 8192 and attention.documents("3x40") == [40] * 3
    lines, output = run(attention, monkeypatch, capsys, "--packs=5x24", "--repeats=1")
    timed = [line["case"] for line in lines if "skipped" not in line]
    assert timed == ["dense mask", "padded", "packed: sdpa"]
    assert "GPU not measured" in output
