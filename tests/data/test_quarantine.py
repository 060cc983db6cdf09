"""Faults of samples: left out, written down, counted, fatal when many."""

import json
import os

import pytest
from sample_factory import make_sample, mixed

from infimed.contracts import UserError
from infimed.data.encode import Encoder
from infimed.data.shards import open_shards, write_shards


def damaged(tmp_path, tokenizer, bad: range, count: int = 40):
    """Write shards in which one byte of each `bad` sample's last member is wrong."""
    folder = tmp_path / "shards"
    write_shards(mixed(count), folder, max_samples=10, tokenizer=tokenizer)
    for number in bad:
        row = open_shards([folder]).rows[number]
        with open(row.shard, "r+b") as file:
            file.seek(row.members[-1].offset + 9)
            file.write(b"\xee")
    return folder


def consume_all(module):
    """Train on nothing: report every batch as consumed."""
    batches = []
    for batch in module.train_dataloader():
        module.consumed(batch)
        batches.append(batch)
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_sample_leaves_a_hole_and_nothing_shifts(tmp_path, tokenizer, make_module, workers):
    folder = damaged(tmp_path, tokenizer, range(3, 36, 16))
    bad = {"s00003", "s00019", "s00035"}
    sound = tmp_path / "sound"
    write_shards(mixed(40), sound, max_samples=10, tokenizer=tokenizer)
    whole = list(make_module(train=[sound]).train_dataloader())
    module = make_module(train=[folder], num_workers=workers, quarantine_path=tmp_path / "q" / "quarantine.jsonl", max_fault_rate=0.5)
    holed = consume_all(module)
    assert [tuple(key for key in batch.keys if key not in bad) for batch in whole] == [batch.keys for batch in holed]
    lines = [json.loads(line) for line in (tmp_path / "q" / "quarantine.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in lines} == {(key, "checksum") for key in bad}
    assert set(lines[0]) == {"shard", "key", "source", "reason", "step"}
    assert module.quarantine.faults == {"alpha/checksum": 1, "beta/checksum": 1, "gamma/checksum": 1}
    assert module.quarantine.seen == sum(len(batch.keys) for batch in whole) == 37


def test_too_many_faults_end_the_run_with_the_counts(tmp_path, tokenizer, make_module):
    module = make_module(train=[damaged(tmp_path, tokenizer, range(0, 40, 2))], max_fault_rate=0.2, min_seen=10)
    with pytest.raises(UserError, match=r"samples are unusable, more than data.max_fault_rate=0.2 \(.*checksum: .*check_shards"):
        consume_all(module)


def test_nothing_but_faults_ends_the_run_early(tmp_path, tokenizer, make_module):
    module = make_module(train=[damaged(tmp_path, tokenizer, range(40))], max_fault_rate=1, max_faults_in_a_row=6)
    with pytest.raises(UserError, match="were all unusable"):
        consume_all(module)
    assert 6 <= module.quarantine.seen < 20


def test_faults_in_a_row_are_counted_by_sample_across_rows(tmp_path, tokenizer, make_module):
    write_shards(mixed(60), tmp_path, tokenizer=tokenizer)
    order = [key for batch in make_module(train=[tmp_path]).train_dataloader() for key in batch.keys]
    length = next(len(batch.keys) for batch in make_module(train=[tmp_path]).train_dataloader())
    bad = order[length - 2 : length + 2]  # two at the end of the first batch, two at the start of the second
    for row in open_shards([tmp_path]).rows:
        if row.key in bad:
            with open(row.shard, "r+b") as file:
                file.seek(row.members[-1].offset + 9)
                file.write(b"\xee")
    consume_all(make_module(train=[tmp_path], max_fault_rate=1, max_faults_in_a_row=5))
    with pytest.raises(UserError, match="4 samples in a row were all unusable"):
        consume_all(make_module(train=[tmp_path], max_fault_rate=1, max_faults_in_a_row=4))


def test_a_resumed_run_goes_on_counting(tmp_path, tokenizer, make_module):
    module = make_module(train=[damaged(tmp_path, tokenizer, range(20, 22))], max_fault_rate=0.2, min_seen=100)
    module.quarantine.resume(seen=100, faults={"alpha/checksum": 28})
    with pytest.raises(UserError, match=r"of 1\d\d samples are unusable, more than data.max_fault_rate=0.2 \(.*alpha/checksum: (28|29)"):
        consume_all(module)


def test_an_undecodable_image_is_quarantined_by_its_own_reason(tmp_path, tokenizer, make_module):
    sample, _ = make_sample(0)
    write_shards([(sample, [b"no image"]), make_sample(1)], tmp_path, tokenizer=tokenizer)
    (batch,) = make_module(train=[tmp_path]).train_dataloader()
    assert (batch.keys, dict(batch.faults)) == (("s00001",), {"alpha/undecodable_image": 1})


def test_a_programming_error_is_never_quarantined(make_module, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("infimed.data.encode.render", broken)
    with pytest.raises(KeyError):
        next(iter(make_module().train_dataloader()))


def test_a_length_that_drifted_from_the_index_is_quarantined(tmp_path, tokenizer, make_module, monkeypatch):
    write_shards(mixed(6), tmp_path, tokenizer=tokenizer)
    module = make_module(train=[tmp_path])
    before = Encoder.__call__

    def drifted(self, sample, images, *, expected_tokens, **rest):
        return before(self, sample, images, expected_tokens=expected_tokens + (sample.key == "s00002"), **rest)

    monkeypatch.setattr(Encoder, "__call__", drifted)
    faults = [name for batch in module.train_dataloader() for name in batch.faults]
    assert faults == ["gamma/length_drift"]


def test_a_truncated_tar_leaves_holes_and_nothing_shifts(tmp_path, tokenizer, make_module):
    sound, cut = tmp_path / "sound", tmp_path / "cut"
    for folder in (sound, cut):
        write_shards(mixed(40), folder, max_samples=10, tokenizer=tokenizer)
    tar = sorted(cut.glob("*.tar"))[1]
    rows = [row for row in open_shards([cut]).rows if row.shard == str(tar)]
    os.truncate(tar, rows[6].members[0].offset + 1)
    lost = {row.key for row in rows[6:]}
    whole, holed = (
        list(make_module(train=[sound]).train_dataloader()),
        list(make_module(train=[cut], max_fault_rate=0.5).train_dataloader()),
    )
    assert [tuple(key for key in batch.keys if key not in lost) for batch in whole] == [batch.keys for batch in holed]
    assert {name.split("/")[1] for batch in holed for name in batch.faults} == {"truncated"}
    assert sum(sum(batch.faults.values()) for batch in holed) == sum(key in lost for batch in whole for key in batch.keys) > 0
