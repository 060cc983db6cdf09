"""Several processes: none waits for ever, all take the same steps, and a run goes on with another number of them."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from itertools import chain

import pytest
import torch

from infimed.contracts import UserError
from infimed.training.checkpoint import recount
from tests.training.rank_jobs import fit, train, write_traps
from tests.training.ranks import run_ranks
from tests.training.support import run, run_and_cut, steps_of, tiny

COUNT = 23  # no number of ranks from 2 to 4 divides it


@pytest.fixture
def shards(tmp_path):
    return write_traps(tmp_path, count=COUNT, texts=11, damaged=1)


def hang(rank, *, world_size):
    time.sleep(600 if rank else 0)


def test_a_hang_fails_in_time_instead_of_stalling():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="rank 1 hangs"):
        run_ranks(hang, world_size=2, timeout=3)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("strategy", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 3)])
def test_every_rank_takes_the_same_steps_whatever_its_rows_hold(shards, strategy, world_size):
    ranks = run_ranks(fit, world_size=world_size, shards=str(shards / "train"), strategy=strategy)
    steps = list(zip(*(rank["batches"] for rank in ranks), strict=True))  # every rank had as many batches
    assert {rank["steps"] for rank in ranks} == {len(steps)} == {-(-COUNT // world_size)}
    assert all(rank["losses"] == ranks[0]["losses"] for rank in ranks)
    # the traps were there
    assert any(0 < sum(bool(batch["images"]) for batch in step) < world_size for step in steps), "rows with and without images met"
    assert [sum(not batch["tokens"] for batch in step) for step in steps][-1] == -COUNT % world_size > 0, "the end was ragged"
    assert any(sum(bool(batch["faults"]) for batch in step) == 1 for step in steps), "one rank alone had a bad sample"
    # all samples came, each once
    assert Counter(key for step in steps for batch in step for key in batch["keys"]) == {f"s{i:03d}": 1 for i in range(COUNT - 1)}


def test_fsdp2_which_restores_after_setup_goes_on_at_the_right_batch_also_with_fewer_ranks(shards, tmp_path):
    given = {"shards": str(shards / "train"), "strategy": "fsdp2"}
    straight = run_ranks(fit, world_size=2, **given)
    run_ranks(fit, world_size=2, **given, save=str(tmp_path / "saved"), cut=5)
    resumed = run_ranks(fit, world_size=2, **given, resume=str(tmp_path / "saved" / "last.ckpt"))
    for rank, whole in zip(resumed, straight, strict=True):
        assert rank["batches"] == whole["batches"][5:]
        assert rank["losses"] == whole["losses"][5:]
    (alone,) = run_ranks(fit, world_size=1, **given, accumulate=2, resume=str(tmp_path / "saved" / "last.ckpt"))
    expected = [sorted(step[0]["keys"] + step[1]["keys"]) for step in zip(*(rank["batches"] for rank in straight), strict=True)]
    keys = [batch["keys"] for batch in alone["batches"]]
    assert [sorted(chain(*keys[i : i + 2])) for i in range(0, len(keys), 2)] == expected[5:]
    assert alone["losses"] == pytest.approx(straight[0]["losses"][5:], rel=1e-5)  # measured: 2.4e-8


def elastic(tmp_path, folder, *extra):
    recorded = ("++callbacks.record.keys=true", "callbacks.checkpoint.every_n_train_steps=1", "global_batch=4", "data.select={}")
    overrides = [o for o in tiny(tmp_path, tmp_path / folder, *recorded) if not o.startswith("max_steps=")]
    return [*overrides, "data.val=[]", "data.epochs=1", "data.max_tokens=90", *extra]


def keys_of(folder):
    return [json.loads(line)["keys"] for line in (folder / "keys.jsonl").read_text().splitlines()]


def test_a_run_goes_on_with_two_ranks_and_with_one_again_and_takes_the_same_steps(tmp_path):
    write_traps(tmp_path, count=61, texts=20)
    run(elastic(tmp_path, "straight"))
    run_and_cut(elastic(tmp_path, "moved"), step=1)
    saved = torch.load(tmp_path / "moved" / "last.ckpt", weights_only=True)
    counted = copy.deepcopy(saved["loops"])
    recount(saved, accumulation=4)
    assert saved["loops"] == counted, "the same cut changes nothing"
    two = ["trainer.devices=2", "+trainer.strategy=ddp", "data.packs_per_batch=2", "callbacks.checkpoint.every_n_train_steps=2"]
    cut = "+callbacks.cut={_target_: tests.training.support.CutAfter, step: 5}"
    run_ranks(train, world_size=2, overrides=elastic(tmp_path, "moved", *two, cut), cut=5)
    run(elastic(tmp_path, "moved", "data.packs_per_batch=4"))
    straight, moved = steps_of(tmp_path / "straight"), steps_of(tmp_path / "moved")
    assert len(straight) > 6
    assert sum(line["samples"] for line in straight) == 61
    for name in ("step", "samples", "keys"):
        assert [line[name] for line in moved] == [line[name] for line in straight]
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in straight], rel=1e-5)  # measured: 1.2e-8
    steps = keys_of(tmp_path / "moved")
    assert [len(ranks) for ranks in steps] == [1] + [2] * 3 + [1] * (len(straight) - 4)  # the fifth was not saved and came again
    assert Counter(key for ranks in steps for keys in ranks for key in keys) == {f"s{i:03d}": 1 for i in range(61)}


def test_another_global_batch_is_refused_and_says_so(tmp_path):
    write_traps(tmp_path, count=61)
    run_and_cut(elastic(tmp_path, "run"), step=2)
    with pytest.raises(UserError, match="global_batch: 4 then, 8 now"):
        run(elastic(tmp_path, "run", "global_batch=8"))


VALIDATED = (  # every second micro-batch, saved after it
    *("trainer.val_check_interval=2", "callbacks.checkpoint.every_n_train_steps=null"),
    *("+callbacks.checkpoint.every_n_epochs=1", "+callbacks.checkpoint.save_on_train_epoch_end=false"),
)


@pytest.mark.parametrize(("saving", "batches"), [((), 2), (VALIDATED, 3)], ids=["after_a_resume", "at_a_validation"])
def test_a_checkpoint_from_between_two_steps_loses_no_micro_batch(tmp_path, saving, batches):
    """In the first micro-batch after a resume Lightning saves again, and it validates when it likes: gradients under way are not saved."""
    write_traps(tmp_path, count=61)
    saving = [*saving, f"data.val=[{write_traps(tmp_path / 'few', count=2) / 'train'}]"]
    run(elastic(tmp_path, "straight", *saving))
    run_and_cut(elastic(tmp_path, "run"), step=3)
    overrides = elastic(tmp_path, "run", *saving, f"+callbacks.cut={{_target_: tests.training.rank_jobs.CutWithin, batches: {batches}}}")
    with pytest.raises(RuntimeError, match="in mid step"):
        run(overrides)
    position = json.loads((tmp_path / "run" / "last.data.json").read_text())
    assert (position["step"], position["packs"]) == (3, 12)
    run(elastic(tmp_path, "run", *saving))
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "straight")
