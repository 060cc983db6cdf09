from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield {name: importlib.import_module(name) for name in ("mixes", "packers", "packing", "packing_suite")}
    sys.path.remove(str(ROOT / "benchmarks"))


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "packing.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_the_command_prints_one_json_line_of_the_figures(benchmarks, tmp_path):
    np.savez(tmp_path / "lengths.npz", **benchmarks["mixes"].medical(20_000, mix="high"))
    done = call("--lengths", str(tmp_path / "lengths.npz"), "--max-tokens", "8192", "--ranks", "8", "--packs-per-rank", "4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["utilisation"] > 0.999
    assert found["packs"] * 8192 * found["utilisation"] == pytest.approx(benchmarks["mixes"].medical(20_000, mix="high")["len"].sum())
    assert 1 < found["cost_max_over_mean"] < 1.01 < found["arrival_cost_max_over_mean"]
    assert 0 < found["image_share_std"] < 1.2 * found["arrival_image_share_std"]
    assert found["samples"] == 20_000
    assert found["seconds"] > 0
    assert 0 < found["state_bytes"] < 10_000


def test_lengths_that_are_none_are_refused_in_a_line(tmp_path):
    np.savez(tmp_path / "lengths.npz", len=[3, -1])
    done = call("--lengths", str(tmp_path / "lengths.npz"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"len": np.ones(5000, np.uint8)}, {"packs": 2, "samples": 5000, "overlong": 0}),
        ({"len": np.full(10, 3000.0)}, {"packs": 10, "cost_max_over_mean": 1.0}),
        ({"len": np.full(4, 9999)}, {"packs": 0, "samples": 0, "overlong": 4}),
        ({"len": [7], "vis": [5]}, {"packs": 1, "empty_rows": 1, "utilisation": 7 / 4096}),
    ],
)
def test_odd_lengths_have_figures_too(benchmarks, tmp_path, arrays, expected):
    np.savez(tmp_path / "lengths.npz", **arrays)
    given = benchmarks["packing"].load(tmp_path / "lengths.npz")
    found = benchmarks["packing"].measure(given, max_tokens=4096, ranks=2, each=1)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"vis": [1]}, "no array `len`"),
        ({"len": np.zeros(0)}, "`len` is empty"),
        ({"len": [4, -2]}, r"`len` is int64\[2\] from -2 to 4; expected a list of whole numbers, 1 to"),
        ({"len": [1.5]}, "whole numbers"),
        ({"len": [np.nan]}, "whole numbers"),
        ({"len": [[1]]}, "whole numbers"),
        ({"len": [1, 2], "vis": [1]}, "len has 2, vis has 1"),
        ({"len": np.array([1, "a"], object)}, "not an npz file of plain numbers"),
    ],
)
def test_wrong_arrays_are_named(benchmarks, tmp_path, arrays, said):
    np.savez(tmp_path / "lengths.npz", **arrays)
    with pytest.raises(benchmarks["packing"].UserError, match=said):
        benchmarks["packing"].load(tmp_path / "lengths.npz")


def test_no_other_file_is_taken_for_lengths(benchmarks, tmp_path):
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no more")
    for name in ("one.npy", "broken.npz", "missing.npz"):
        with pytest.raises(benchmarks["packing"].UserError, match="not an npz file of plain numbers"):
            benchmarks["packing"].load(tmp_path / name)


def test_missing_squares_are_those_of_images_of_one_size(benchmarks, tmp_path):
    np.savez(tmp_path / "lengths.npz", len=[900, 50], vis=[800, 0], nimg=[2, 0])
    assert benchmarks["packing"].load(tmp_path / "lengths.npz")["vsq"].tolist() == [2 * 400**2, 0]


def test_other_packers_fill_small_cases_as_their_names_say(benchmarks):
    packers = benchmarks["packers"]
    lengths = np.array([6, 5, 4, 5])
    assert packers.padded(lengths, 10) == 4
    assert packers.next_fit(lengths, 10) == 3  # 6 | 5 4 | 5
    assert packers.first_fit(lengths, 10) == 2  # 6 4 | 5 5
    assert packers.best_fit_decreasing(lengths, 10) == 2
    assert packers.knapsack(lengths, 10, spare=0) == 2
    assert packers.knapsack(lengths, 10) == 4  # nothing shares a row while one of the spare ones is empty


def test_the_mixes_are_those_described(benchmarks):
    mixes = benchmarks["mixes"]
    drawn = {mix: mixes.medical(50_000, mix=mix) for mix in mixes.MEDICAL}
    means = {mix: found["len"].mean() for mix, found in drawn.items()}
    assert means == pytest.approx({"high": 1129, "low": 693, "hard": 2994}, rel=0.02)
    for found in drawn.values():
        assert (found["len"] >= found["vis"] + 2 * found["nimg"] + 8 + 12).all()
        assert (found["vsq"] * found["nimg"] >= found["vis"] ** 2).all()
        assert found["nimg"].max() <= 12
    assert (drawn["hard"]["vis"] == 729 * drawn["hard"]["nimg"]).all()


def test_a_simulated_set_resumes_far_inside(benchmarks):
    found = benchmarks["packing_suite"].resume()
    assert found["resume s (CPU)"] < 1  # measured 0.02
    assert found["state_bytes"] < 10_000
