"""The data module: the same stream for any workers, an exact position, and Lightning's resume."""

import json
from collections import Counter
from functools import partial
from itertools import islice

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from infimed.contracts import UserError
from infimed.data.catalogue import Table
from infimed.data.facts import count_facts
from infimed.data.plan import PRICE, Plan
from infimed.data.reader import largest_batch
from infimed.data.shards import open_shards
from infimed.processing.augment import Jitter


def as_bytes(batch) -> tuple:
    tensors = [value.numpy().tobytes() for value in (*vars(batch).values(), batch.images.patches) if isinstance(value, torch.Tensor)]
    return (*tensors, batch.images.grids, batch.keys, batch.step, batch.tokens, batch.supervised_tokens)


def keys(batches) -> Counter:
    return Counter(key for batch in batches for key in batch.keys)


def test_workers_do_not_change_a_byte(make_module):
    streams = [[as_bytes(batch) for batch in make_module(num_workers=n).train_dataloader()] for n in (0, 1, 2)]
    assert len(streams[0]) > 6
    assert streams[0] == streams[1] == streams[2]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_an_epoch_in_equal_steps(make_module, ranks):
    loaders = [make_module(rank=rank, world_size=ranks).train_dataloader() for rank in range(ranks)]
    streams = [list(loader) for loader in loaders]
    assert {len(stream) for stream in streams} == {len(loader) for loader in loaders} == {len(streams[0])}
    module = make_module()
    fitting = Counter(row.key for row in open_shards(module.train_paths).rows if row.length(module.resolution) <= 80)
    assert sum((keys(stream) for stream in streams), Counter()) == fitting


@pytest.mark.parametrize(("stop", "workers"), [(0, 1), (1, 2), (5, 0)])
def test_a_resumed_stream_is_the_same_bytes_with_other_workers(make_module, stop, workers):
    whole = [as_bytes(batch) for batch in make_module(epochs=2).train_dataloader()]
    first, second = make_module(epochs=2, num_workers=1), make_module(epochs=2, num_workers=workers)
    for batch in islice(first.train_dataloader(), stop):
        first.consumed(batch)
    first.setup()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [as_bytes(batch) for batch in second.train_dataloader()] == whole[stop:]
    assert len(second.train_dataloader()) == len(whole)


def test_the_position_counts_consumed_batches_not_those_prepared_ahead(make_module):
    module = make_module(num_workers=1, prefetch=4)
    stream = iter(module.train_dataloader())
    module.consumed(next(stream))
    next(stream)
    assert module.state_dict()["packs"] == 2
    with pytest.raises(RuntimeError, match="one is missing or came twice"):
        module.consumed(next(stream))


def test_the_position_is_read_at_the_first_batch_and_may_not_arrive_later(make_module):
    ahead = make_module()
    for batch in islice(ahead.train_dataloader(), 3):
        ahead.consumed(batch)
    module = make_module()
    stream = iter(module.train_dataloader())
    module.load_state_dict(ahead.state_dict())
    assert next(stream).step == 3
    with pytest.raises(RuntimeError, match="after the first batch was handed out"):
        module.load_state_dict(ahead.state_dict())


def test_a_position_in_other_data_is_refused(make_module):
    state = make_module()
    state.setup()
    for changes in ({"select": {"task": ["plane"]}}, {"mixture": {"alpha": 2}}, {"seed": 8}):
        with pytest.raises(UserError, match="resume with the shards, selection, mixture"):
            make_module(**changes).load_state_dict(state.state_dict())


def test_selection_and_mixture_reach_the_stream(make_module):
    module = make_module(select={"task": ["plane"], "source": ["alpha", "beta"]}, mixture={"alpha": 2}, max_tokens=512)
    rows = open_shards(module.train_paths).rows
    due = {row.key: 1 + (row.source == "alpha") for row in rows if row.task == "plane" and row.source != "gamma"}
    assert keys(module.train_dataloader()) == due
    assert module.dataset_facts().samples == sum(due.values())


def test_validation_shows_each_sample_once_in_order_and_leaves_the_position_alone(make_module, shards_path):
    module = make_module(val=[shards_path / "shard-000001.tar"], max_tokens=512, packing="padded", packs_per_batch=1)
    assert [batch.keys for batch in module.val_dataloader()] == [(f"s{n:05d}",) for n in range(20, 40)]
    assert module.state_dict()["packs"] == 0
    assert next(iter(module.val_dataloader())).sources == next(iter(module.train_dataloader())).sources == module.sources
    assert make_module().val_dataloader() == []


def test_facts_agree_with_the_stream(make_module):
    module = make_module()
    facts, batches = module.dataset_facts(), list(module.train_dataloader())
    assert facts.samples == sum(len(batch.keys) for batch in batches)
    assert facts.tokens == sum(batch.tokens for batch in batches)
    assert facts.visual_tokens == sum(batch.visual_tokens for batch in batches)
    assert facts.steps == len(batches)
    assert facts.whole
    assert facts.utilisation == pytest.approx(facts.tokens / (len(batches) * 160))
    assert sum(facts.overlong.values()) == 60 - facts.samples > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": ["nowhere"]}, "shards=nowhere: no such"),
        ({"val": ["nowhere"]}, "shards=nowhere: no such"),
        ({"train": "nowhere"}, "expected a list"),
        ({"packing": "tight"}, "packing='tight'"),
        ({"on_overflow": "error"}, "samples exceed max_tokens=80"),
        ({"select": {"task": ["plain"]}}, "did you mean plane"),
        ({"max_tokens": 0}, "max_tokens=0: expected at least 1"),
        ({"epochs": None}, "training has no end"),
        ({"mixture": {"*": 1e-9}}, "no sample is shown"),
    ],
)
def test_a_users_mistake_is_named(make_module, changes, said):
    with pytest.raises(UserError, match=said):
        make_module(**changes).train_dataloader()


def test_what_a_longer_row_would_hold_is_listed_and_can_be_trained_on_alone(make_module, tmp_path):
    short = make_module(max_tokens=40)
    count = short.write_overlong(tmp_path / "overlong.jsonl")
    longer = make_module(max_tokens=512, only=[tmp_path / "overlong.jsonl"])
    listed = [json.loads(line)["key"] for line in (tmp_path / "overlong.jsonl").read_text().splitlines()]
    assert 0 < count == len(listed) < 60
    assert keys(longer.train_dataloader()) == Counter(listed)
    with pytest.raises(UserError, match=r"only=nowhere\.jsonl: expected JSON lines"):
        make_module(only=["nowhere.jsonl"]).setup()


def test_pieces_of_a_split_sample_teach_every_token_once(make_module):
    whole, split = make_module(max_tokens=512), make_module(max_tokens=40, on_overflow="split")
    short = make_module(max_tokens=40)
    learned = [sum(batch.supervised_tokens for batch in module.train_dataloader()) for module in (whole, split, short)]
    assert learned[0] == learned[1] > learned[2]
    images = [sum(len(batch.images) for batch in module.train_dataloader()) for module in (whole, split)]
    assert images[0] == images[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_shares_that_change_on_the_way_take_effect_at_the_next_batch_and_survive_a_resume(make_module, workers):
    def stream(module, count):
        for batch in islice(module.train_dataloader(), count):
            module.consumed(batch)
            yield batch

    settings = {"epochs": None, "max_steps": 30, "shares": {"alpha": 1, "beta": 1, "gamma": 1}, "num_workers": workers, "buffer": 4}
    module, seen = make_module(**settings), []
    for number, batch in enumerate(stream(module, 30)):
        if number == 9:
            module.reweigh({"alpha": 1, "beta": 0, "gamma": 0})
            state = json.loads(json.dumps(module.state_dict()))
        seen.append(as_bytes(batch))
        last = batch
    assert set(last.keys) <= {f"s{n:05d}" for n in range(0, 60, 3)}  # alpha alone, once the buffer has run out of the others
    resumed = make_module(**settings)
    resumed.load_state_dict(state)
    assert [as_bytes(batch) for batch in stream(resumed, 30)] == seen[10:]
    with pytest.raises(UserError, match="only where max_steps ends training"):
        make_module().reweigh({"alpha": 1})


def test_augmentation_follows_the_sample_not_the_worker(make_module):
    jitter = Jitter(brightness=0.3)
    cases = ((0, None), (0, jitter), (2, jitter))
    modules = [make_module(epochs=2, num_workers=workers, augment=augment) for workers, augment in cases]
    plain, *augmented = ([as_bytes(batch) for batch in module.train_dataloader()] for module in modules)
    assert augmented[0] == augmented[1] != plain
    module = make_module(epochs=2, augment=jitter)
    for batch in islice(module.train_dataloader(), 3):
        module.consumed(batch)
    resumed = make_module(epochs=2, augment=jitter)
    resumed.load_state_dict(module.state_dict())
    assert [as_bytes(batch) for batch in resumed.train_dataloader()] == augmented[0][3:]


def test_prefetch_is_lowered_to_what_fits_the_memory_allowed(make_module):
    module = make_module(num_workers=2, prefetch=8)
    assert module.train_dataloader()._prefetch() == 8
    module.prefetch_mb = 2 * 3 * largest_batch(module.resolution, 160) / 2**20
    assert module.train_dataloader()._prefetch() == 3
    batch = next(iter(module.train_dataloader()))
    assert batch.images.patches.numel() + 5 * 8 * 160 <= largest_batch(module.resolution, 160)


class Consume(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.datamodule.consumed(batch)


class Recorder(lightning.LightningModule):
    """Learns nothing of use, remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[tuple[str, ...]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.keys)
        return self.weight * batch.tokens

    def configure_optimizers(self):
        _ = self.trainer.estimated_stepping_batches  # makes Lightning ask for the loader before it restores
        return torch.optim.SGD(self.parameters(), lr=0.0)


class RestoreLate(SingleDeviceStrategy):
    """Restores after setup, as FSDP and ModelParallel do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


def fit(module, folder, *, strategy="auto", ckpt=None, consume=True, max_epochs=1, **settings) -> list[tuple[str, ...]]:
    recorder = Recorder()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        callbacks=[saver, *([Consume()] if consume else [])],
        accelerator="cpu" if strategy == "auto" else "auto",
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(recorder, datamodule=module, ckpt_path=ckpt, weights_only=True)
    return recorder.seen


@pytest.mark.parametrize("late", [False, True])
def test_lightning_resumes_at_the_next_batch_whenever_it_restores(make_module, tmp_path, late):
    whole = fit(make_module(epochs=2), tmp_path)
    assert len(whole) == len(make_module(epochs=2).train_dataloader())
    strategy = RestoreLate(device=torch.device("cpu")) if late else "auto"
    for step in (1, 6, len(whole) - 1):
        resumed = fit(make_module(epochs=2), tmp_path / "again", ckpt=tmp_path / f"step={step}.ckpt", strategy=strategy)
        assert resumed == whole[step:]


def test_lightning_stops_and_resumes_by_steps_under_accumulation(make_module, tmp_path):
    whole = fit(make_module(epochs=None), tmp_path, max_steps=6, accumulate_grad_batches=2)
    assert len(whole) == 12
    resumed = fit(make_module(epochs=None), tmp_path, max_steps=6, accumulate_grad_batches=2, ckpt=tmp_path / "step=4.ckpt")
    assert resumed == whole[8:]


def test_a_run_that_reports_no_consumed_batch_is_stopped(make_module, tmp_path):
    with pytest.raises(RuntimeError, match=r"consumed\(batch\) is not called"):
        fit(make_module(epochs=4), tmp_path, consume=False)


@pytest.mark.parametrize("max_epochs", [3, -1])
def test_epochs_counted_by_lightning_too_are_refused(make_module, tmp_path, max_epochs):
    with pytest.raises(UserError, match=f"trainer.max_epochs={max_epochs}: expected 1"):
        fit(make_module(epochs=2), tmp_path, max_epochs=max_epochs, max_steps=50)


def test_the_plan_changes_between_batches_only(make_module):
    module = make_module(epochs=None, max_steps=20)
    stream = iter(module.train_dataloader())
    module.reweigh({"*": 1})
    batch = next(stream)
    for change in (partial(module.reweigh, {"*": 1}), partial(module.reprice, PRICE)):
        with pytest.raises(RuntimeError, match="a batch is out that is not consumed yet"):
            change()
    module.consumed(batch)
    module.reweigh({"*": 1})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"only": "overlong.jsonl"}, r"data.only=overlong.jsonl: expected a list, such as \[overlong.jsonl\]"),
        ({"select": {"task": 3}}, r"data.select.task=3: expected a list"),
        ({"curriculum": [{"step": 1, "shares": 3}]}, r"data.curriculum: .*expected \{step: optimizer step"),
        ({"curriculum": [5]}, r"data.curriculum: 5: expected \{step: optimizer step"),
        ({"augment": {"brightness": 0.1}}, r"data.augment=.*expected \{_target_: "),
        ({"num_workers": -1}, r"data.num_workers=-1: expected 0 "),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(make_module, option, said):
    with pytest.raises(UserError, match=said):
        make_module(**option)


def test_validation_says_what_it_leaves_out(make_module, shards_path, caplog):
    module = make_module(val=[shards_path], max_tokens=40)
    longer = Counter(row.source for row in open_shards(module.val_paths).rows if row.length(module.resolution) > 40)
    assert longer
    module.val_dataloader()
    counts = ", ".join(f"{source} {count}" for source, count in sorted(longer.items()))
    assert f"validation leaves out samples that are longer than max_tokens=40: {counts}" in caplog.text


def test_the_first_batch_is_that_of_the_begin_wherever_the_position_is(make_module):
    module = make_module()
    whole = list(module.train_dataloader())
    for batch in whole:
        module.consumed(batch)
    assert as_bytes(module.first_batch()) == as_bytes(whole[0])


def test_the_facts_of_a_large_set_are_those_of_its_beginning_on_any_number_of_ranks():
    for ranks in (1, 512):
        facts = count_facts(Plan(Table([64] * 20_000), max_tokens=64, packs_per_batch=8, world_size=ranks, epochs=1))
        assert facts.steps * ranks * 8 == 8192
        assert not facts.whole


@pytest.mark.parametrize("on_overflow", ["drop", "split"])
def test_what_is_listed_for_a_longer_stage_is_what_was_left_out(make_module, tmp_path, on_overflow):
    module = make_module(max_tokens=40, on_overflow=on_overflow)
    for batch in module.train_dataloader():
        module.consumed(batch)
    assert module.write_overlong(tmp_path / "overlong.jsonl") == sum(module.overlong().values())
