"""What TensorBoard, the progress bar and the run folder show."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infimed.data.shards import open_shards
from infimed.training.callbacks.samples import card
from tests.training.support import run, steps_of, tiny


@pytest.fixture
def folder(tiny_shards):
    """A finished run of six steps with two rows each."""
    run(tiny(tiny_shards, tiny_shards / "run", "global_batch=2", "data.epochs=null", "system.log_every=2", steps=6))
    return tiny_shards / "run"


def board(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_tensorboard_gets_the_curves_the_panel_the_configuration_and_the_final_metric(folder):
    events = board(folder)
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "train/loss",
        "train/loss_squares",
        "train/loss_general",
        "train/pack_utilisation",
        "train/supervised_tokens",
        "perf/tokens_per_s",
        "perf/visual_tokens_per_s",
        "perf/data_wait",
        "mixture/asked_squares",
        "mixture/samples_squares",
        "mixture/tokens_squares",
        "optim/lr_language",
        "optim/grad_norm_projector",
        "val/loss",
        "final/val_loss",
    }
    assert "optim/lr_vision" not in scalars  # frozen
    assert events.Tags()["images"] == ["panel/0", "panel/1"]
    assert len(events.Images("panel/0")) == 2  # the same case at both validations
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "global_batch: 2" in text
    assert "projector" in events.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0].decode()
    result = json.loads((folder / "done.json").read_text())
    assert events.Scalars("final/val_loss")[0].value == pytest.approx(result["val_loss"])


def test_a_logged_loss_is_the_exact_mean_that_the_step_was_taken_by(folder):
    logged = {e.step: e.value for e in board(folder).Scalars("train/loss")}
    recorded = {line["step"]: line["loss"] for line in steps_of(folder)}
    assert set(logged) == {0, 2, 4, 5}  # counted before the optimizer's step
    assert all(value == pytest.approx(recorded[step + 1], rel=1e-6) for step, value in logged.items())


def test_losses_by_source_average_to_the_loss_by_their_tokens(folder):
    events = board(folder)
    whole, squares, general = (events.Scalars(f"train/{name}")[0].value for name in ("loss", "loss_squares", "loss_general"))
    assert min(squares, general) <= whole <= max(squares, general)


def test_realised_shares_stand_beside_those_asked_for(folder):
    events = board(folder)
    last = {
        kind: {name: events.Scalars(f"mixture/{kind}_{name}")[-1].value for name in ("squares", "general")}
        for kind in ("asked", "samples", "tokens")
    }
    assert all(sum(shares.values()) == pytest.approx(1, abs=1e-6) for shares in last.values())
    assert last["samples"]["squares"] == pytest.approx(last["asked"]["squares"], abs=0.2)


def test_over_long_samples_are_counted_listed_and_taken_up_by_a_longer_stage(tiny_shards, capsys):
    folder, lengths = tiny_shards / "short", sorted(row.text_tokens + 4 for row in open_shards([tiny_shards / "train"]).rows)
    middle = lengths[len(lengths) // 2]
    run(tiny(tiny_shards, folder, f"data.max_tokens={middle}", "callbacks.panel.count=0", steps=4))
    listed = [json.loads(line) for line in (folder / "overlong.jsonl").read_text().splitlines()]
    assert sorted(line["tokens"] for line in listed) == [length for length in lengths if length > middle]
    assert f"{len(listed)} samples are longer than a row" in capsys.readouterr().out
    assert any(tag.endswith("/overlong") for tag in board(folder).Tags()["scalars"])
    longer = tiny_shards / "longer"
    run(tiny(tiny_shards, longer, f"data.only=[{folder / 'overlong.jsonl'}]", "data.epochs=1", "max_steps=null"))
    assert sum(line["samples"] for line in steps_of(longer)) == len(listed)


def test_utilisation_is_the_share_of_slots_that_hold_tokens(folder):
    values = [e.value for e in board(folder).Scalars("train/pack_utilisation")]
    assert all(0.8 < value <= 1 for value in values)


def test_a_card_shows_a_right_answer_in_green_and_a_wrong_one_in_red():
    picture = torch.zeros(3, 28, 28, dtype=torch.uint8)
    right, wrong = card(picture, "<image>\nWhich plane?", "axial", "axial"), card(picture, "<image>\nWhich plane?", "axial", "coronal")

    def inked(image, colour):
        return (image == torch.tensor(colour).numpy()).all(-1).any()

    green, red = (0x1A, 0x7F, 0x37), (0xB4, 0x23, 0x18)
    assert inked(right, green)
    assert not inked(right, red)
    assert inked(wrong, red)
    assert right.shape == wrong.shape == (430, 280, 3)
