"""The promise of the main job: the quickstart as shipped learns to see, and its checkpoint answers. Minutes, so `make test-slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

VISUAL = {"plane", "level", "modality", "organ", "skull", "facing", "order", "same_plane", "colour", "shape"}


def python(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    began = time.monotonic()
    python("infimed.train", "experiment=quickstart", f"run_dir={folder}")
    print(f"quickstart: {time.monotonic() - began:.0f} s")
    return folder


@pytest.mark.slow
def test_the_quickstart_beats_both_baselines_on_at_least_three_visual_families(quickstart):
    rows = json.loads((quickstart / "evaluation" / "table.json").read_text())["rows"]
    learned = {row["group"].removeprefix("in / ") for row in rows if row["group"].startswith("in / ") and row["learned"] == "yes"}
    print((quickstart / "evaluation" / "table.md").read_text())
    assert len(learned & VISUAL) >= 3, learned
    assert {row["group"].split(" / ")[0] for row in rows if row["grouping"] == "domain x task"} == {"in", "shifted"}


@pytest.mark.slow
def test_its_checkpoint_answers_a_question_about_the_readmes_picture(quickstart):
    said = python("infimed.chat", "image=docs/slice.png", f"ckpt={quickstart / 'last'}", "question='In which plane is this slice?'")
    assert said.strip() in {"axial", "coronal", "sagittal"}


@pytest.mark.slow
def test_evaluating_the_checkpoint_again_gives_the_same_answers(quickstart, tmp_path):
    python("infimed.evaluate", "experiment=quickstart", f"ckpt={quickstart / 'last'}", f"run_dir={tmp_path}")

    def responses(folder):
        lines = (folder / "model" / "predictions.jsonl").read_text().splitlines()
        return {line["id"]: line["response"] for line in map(json.loads, lines)}

    assert responses(tmp_path) == responses(quickstart / "evaluation")
