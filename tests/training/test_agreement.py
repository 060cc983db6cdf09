"""Ranks whose plans differ stop together and say why; nothing they disagree on is saved."""

from __future__ import annotations

import json

import pytest

from infimed.contracts import UserError
from infimed.data.datamodule import ShardDataModule
from infimed.training.callbacks.agreement import Agreement
from tests.training.rank_jobs import write_traps
from tests.training.ranks import run_ranks
from tests.training.support import run, steps_of, tiny

TWO = ("trainer.devices=2", "+trainer.strategy=ddp", "global_batch=2", "data.epochs=null", "data.val=[]", "data.select={}")


def overrides(folder, *extra, every, steps=6):
    """Two ranks; the agreement's turn is before the checkpoint's, as in the shipped configuration."""
    callback = f"++callbacks.agreement={{_target_: infimed.training.callbacks.agreement.Agreement, every: {every}}}"
    given = [o for o in tiny(folder, folder / "run", *TWO, callback, *extra, steps=steps) if not o.startswith(f"data.val=[{folder}")]
    return [*given, "data.max_tokens=48"]


def job(rank, *, world_size, overrides, seed_of_rank=False, drift_at=None):
    """Return the error that a rank stops with. `drift_at`: from this optimizer step on rank 1 stands elsewhere."""
    plain = ShardDataModule.digest

    def digest(data):
        drifted = drift_at is not None and rank == 1 and data.trainer.global_step >= drift_at
        return plain(data) ^ drifted

    ShardDataModule.digest = digest
    try:
        run([*overrides, f"seed={rank}"] if seed_of_rank else overrides)
    except UserError as error:
        return str(error)
    finally:
        ShardDataModule.digest = plain
    return None


@pytest.fixture
def shards(tmp_path):
    return write_traps(tmp_path, count=23)


def test_a_rank_of_another_seed_stops_both_before_the_first_step_and_the_option_is_named(shards):
    first, second = run_ranks(job, world_size=2, overrides=overrides(shards, every=50), seed_of_rank=True)
    assert first == second
    assert "disagree about the data at optimizer step 0: rank 0 " in first
    assert "; rank 1 " in first
    assert "data.seed: 0 on rank 0, 1 on rank 1" in first
    steps = shards / "run" / "steps.jsonl"
    assert not steps.exists() or not steps.read_text()


def test_a_rank_that_drifts_away_is_found_at_the_next_comparison(shards):
    errors = run_ranks(job, world_size=2, overrides=overrides(shards, every=2), drift_at=3)
    assert all("at optimizer step 4" in error and "Their options are the same" in error for error in errors)


def test_nothing_that_ranks_disagree_on_is_saved(shards):
    saving = "callbacks.checkpoint.every_n_train_steps=1"
    errors = run_ranks(job, world_size=2, overrides=overrides(shards, saving, every=50), drift_at=3)
    assert all("at optimizer step 3" in error for error in errors)
    assert json.loads((shards / "run" / "last.data.json").read_text())["step"] == 2


def test_ranks_that_agree_train_to_the_end(shards):
    assert run_ranks(job, world_size=2, overrides=overrides(shards, every=2)) == [None, None]
    assert [line["step"] for line in steps_of(shards / "run")] == [1, 2, 3, 4, 5, 6]


def test_comparing_never_is_refused():
    with pytest.raises(UserError, match="expected at least 1 optimizer step"):
        Agreement(every=0)
