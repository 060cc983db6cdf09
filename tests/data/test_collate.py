"""One row of tensors: segments, positions, labels and sources."""

import pytest
import torch
from sample_factory import make_sample

from infimed.contracts import IGNORE_INDEX, ROWS, DataFault, borders
from infimed.data.collate import collate
from infimed.data.encode import Encoder
from infimed.processing.chat import render
from infimed.processing.resolution import Resolution

RESOLUTION = Resolution(patch_size=4, image_size=16, visual_grid=3)


@pytest.fixture
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer, RESOLUTION)


@pytest.fixture
def encoded(encoder):
    made = []
    for number, images in enumerate((1, 0, 2)):
        sample, files = make_sample(number, images=images, words=4 + number, source=("beta", "alpha", "beta")[number])
        tokens = len(render(sample.messages, encoder.tokenizer, visual_tokens=[9] * images).input_ids)
        made.append(encoder(sample, files, expected_tokens=tokens))
    return made


def row(encoded, **changes):
    settings = {"row_tokens": 256, "pad_id": 5, "resolution": RESOLUTION, "sources": ("alpha", "beta"), "step": 4}
    return collate(encoded, **{**settings, **changes})


def test_a_row_is_its_samples_end_to_end_then_padding(encoded):
    batch, lengths = row(encoded), [len(sample.input_ids) for sample in encoded]
    used = sum(lengths)
    assert batch.cu_seqlens.tolist() == [0, lengths[0], lengths[0] + lengths[1], used, 256]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.tolist() == [[i for sample in encoded for i in sample.input_ids.tolist()] + [5] * (256 - used)]
    assert batch.position_ids.tolist() == [[i for length in [*lengths, 256 - used] for i in range(length)]]
    assert batch.source_ids.tolist() == [[1] * lengths[0] + [0] * lengths[1] + [1] * lengths[2] + [0] * (256 - used)]
    assert max(*lengths, 256 - used) <= batch.max_seqlen <= 256
    assert batch.max_seqlen in (64, 128, 256)
    assert (batch.keys, batch.sources, batch.step, batch.tokens) == (("s00000", "s00001", "s00002"), ("alpha", "beta"), 4, used)


def test_images_and_their_tokens_agree(encoded, encoder):
    batch = row(encoded)
    assert batch.images.patches.shape == (3 * 16, 48)
    assert batch.images.patches.dtype == torch.uint8
    assert batch.images.grids == ((4, 4),) * 3
    assert batch.images.cu_seqlens.tolist() == [0, 16, 32, 48, 48]  # a power of two of slots
    assert batch.images.max_seqlen == 16
    assert batch.visual_tokens == 27 == int((batch.input_ids == encoder.tokenizer.image_id).sum())


def test_no_label_crosses_a_border_and_padding_is_never_learned(encoded):
    batch = row(encoded)
    assert (batch.labels[0, batch.cu_seqlens[:-1]] == IGNORE_INDEX).all()
    assert (batch.labels[0, batch.tokens :] == IGNORE_INDEX).all()
    learned = batch.labels != IGNORE_INDEX
    assert batch.supervised_tokens == int(learned.sum()) == sum(int((s.labels != IGNORE_INDEX).sum()) for s in encoded) > 0
    assert (batch.labels[learned] == batch.input_ids[learned]).all()


def test_the_parents_way_is_one_segment_with_positions_running_on(encoded):
    batch = row(encoded, merged=[len(encoded)])
    assert batch.cu_seqlens.tolist() == [0, batch.tokens, 256]
    assert batch.position_ids[0, : batch.tokens].tolist() == list(range(batch.tokens))
    assert torch.equal(batch.labels, row(encoded).labels)


def test_merged_packs_of_a_batch_do_not_see_each_other(encoded):
    lengths = [len(sample.input_ids) for sample in encoded]
    batch = row(encoded, merged=[1, 0, len(encoded) - 1])
    assert batch.lengths == (lengths[0], sum(lengths[1:]))
    assert batch.cu_seqlens.unique().tolist() == [0, lengths[0], sum(lengths), 256]


def test_tokens_are_counted_by_source(encoded):
    batch = row(encoded)
    assert sum(batch.source_tokens) == batch.tokens
    for number, source in enumerate(batch.sources):
        assert batch.source_tokens[number] == sum(len(sample.input_ids) for sample in encoded if sample.source == source)


def test_a_full_row_has_no_padding_segment_and_an_empty_one_nothing_else(encoded):
    used = sum(len(sample.input_ids) for sample in encoded)
    assert row(encoded, row_tokens=used).cu_seqlens[-1] == used
    assert row(encoded, row_tokens=used).cu_seqlens.unique().numel() == 4
    empty = row([], faults={"a/checksum": 2})
    assert empty.cu_seqlens.tolist() == [0, 256]
    assert (empty.tokens, empty.visual_tokens, empty.supervised_tokens, empty.keys) == (0, 0, 0, ())
    assert empty.images.patches.shape == (0, 48)
    assert len(empty.images) == len(empty.rows) == 0
    assert empty.faults == {"a/checksum": 2}


def test_another_length_than_planned_is_a_length_drift(encoder):
    sample, files = make_sample(0)
    with pytest.raises(DataFault, match=r"length_drift: s00000: .* planned with 7"):
        encoder(sample, files, expected_tokens=7)


def test_moving_a_batch_keeps_everything_but_the_device(encoded):
    moved = row(encoded).to(torch.device("meta"))
    assert moved.input_ids.device.type == moved.images.patches.device.type == "meta"
    assert moved.keys == row(encoded).keys


def test_supervised_rows_are_listed_and_padded_with_a_row_that_is_never_supervised(encoded):
    batch = row(encoded)
    assert len(batch.rows) == ROWS > batch.supervised_tokens
    assert batch.rows[: batch.supervised_tokens].tolist() == (batch.labels[0] != IGNORE_INDEX).nonzero().flatten().tolist()
    assert (batch.rows[batch.supervised_tokens :] == 0).all()
    assert batch.labels[0, 0] == IGNORE_INDEX


@pytest.mark.parametrize(("lengths", "expected"), [([3], [0, 3]), ([1, 2, 2], [0, 1, 3, 5, 5]), ([], [0, 0]), ([2] * 4, [0, 2, 4, 6, 8])])
def test_borders_are_the_running_sum_with_empty_segments_up_to_a_power_of_two(lengths, expected):
    assert borders(lengths).tolist() == expected
