from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from infimed import preview
from infimed.train import build_trainer
from tools.inspect_batch import main

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
# A published stage on the bundled samples: its weights, and the stage that it starts from, are not there.
STAGE = (
    *("experiment=sft_stage2", "model=tiny", "trainer=cpu", "data.max_tokens=512", "data.packs_per_batch=2", "resolution.visual_grid=4"),
    *(f"tokenizer={SAMPLES}/tokenizer", f"data.train=[{SAMPLES}/train]", "data.val=[]", "data.num_workers=0", "global_batch=8"),
)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["inspect_batch"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def the_stage(*overrides):
    found = []
    preview.run(found.extend, [*STAGE, *overrides])
    return found[0]


def test_it_shows_the_batch_that_training_gets():
    stage = the_stage()
    trained = instantiate(stage.data)
    trained.trainer = build_trainer(stage)
    wanted = next(islice(trained.train_dataloader(), 3, None))
    view = preview.view(preview.open_data(stage), step=3, title="")
    assert wanted.step == view.batch.step == 3
    assert wanted.keys == view.batch.keys == tuple(part.key for part in view.segments)
    assert torch.equal(wanted.input_ids, view.batch.input_ids)
    assert torch.equal(wanted.images.patches, view.batch.images.patches)
    sources = [wanted.sources[int(wanted.source_ids[0, part.start])] for part in view.segments]
    assert sources == [part.source for part in view.segments]


def test_each_rank_is_shown_its_own_part_of_the_step():
    stage = the_stage()
    views = [preview.view(preview.open_data(stage, rank=rank, world_size=2), step=1, title="") for rank in (0, 1)]
    keys = [key for view in views for key in view.batch.keys]
    assert len(set(keys)) == len(keys)
    alone = [key for step in (2, 3) for key in preview.view(preview.open_data(stage), step=step, title="").batch.keys]
    assert sorted(keys) == sorted(alone)  # the same global step, dealt otherwise


def test_the_terminal_tells_samples_totals_and_colours_and_writes_nothing(capsys):
    main([*STAGE, "--step", "2"])
    shown = capsys.readouterr().out
    assert shown.startswith("sft_stage2: micro-step 2, rank 0 of 1\n")
    assert re.search(r"of 1,024 slots \d+\.\d\d%", shown)
    assert len(re.findall(r"^pack \d ", shown, re.MULTILINE)) == 2
    assert re.search("\x1b\\[32m[^\x1b]+<\\|im_end\\|>\x1b\\[0m", shown)
    assert "\x1b[36m<image>x16\x1b[0m" in shown
    assert os.listdir() == []


def test_the_page_is_the_only_file_it_writes(capsys):
    main([*STAGE, "--html", "batch.html", "--step", "2"])
    assert os.listdir() == ["batch.html"]
    page = Path("batch.html").read_text()
    assert capsys.readouterr().out.startswith("batch.html: ")
    assert page.count('<section class="sample"') == page.count("<h3>")
    assert "8 × 8 patches, 4 × 4 = 16 tokens" in page
    assert "data:image/png;base64," in page


def test_a_stage_of_a_chain_is_chosen_by_name(capsys, monkeypatch):
    monkeypatch.chdir(SAMPLES.parent)
    main(["experiment=quickstart", "--stage", "sft_stage3"])
    shown = capsys.readouterr().out
    assert shown.startswith("sft_stage3: micro-step 0")
    assert "<image>x16" in shown


def test_a_reader_that_leaves_early_is_no_error():
    tool = [sys.executable, str(SAMPLES.parent / "tools" / "inspect_batch.py"), *STAGE]
    environment = {**os.environ, "PYTHONPATH": str(SAMPLES.parent)}
    with subprocess.Popen(tool, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0, said
    assert "error" not in said.lower()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stage", "nope"], "--stage nope: expected one of sft_stage2"),
        (["--step", "-1"], "--step -1: expected 0 or more"),
        (["--step", "1000000"], "the plan ends before"),
        (["max_steps=2", "--step", "8"], "step=8: the plan ends before; expected 0 to 7"),
        (["--rank", "2", "--world-size", "2"], "--rank 2 --world-size 2: expected a rank from 0"),
        (["--world-size", "3"], "global_batch=8 rows cannot be shared evenly by 3 ranks"),
        (["data.max_token=9"], "did you mean `data.max_tokens`?"),
        (["data.train=[nowhere]"], "data.train names nowhere, which does not exist"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*STAGE, *arguments])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert os.listdir() == []
