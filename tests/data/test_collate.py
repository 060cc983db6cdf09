"""One row of tensors: segments, positions, labels and sources."""

import pytest
import torch
from sample_factory import make_sample

from infimed.contracts import IGNORE_INDEX, DataFault
from infimed.data.collate import collate, to_device
from infimed.data.encode import Encoder
from infimed.processing.chat import render


@pytest.fixture
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer, image_size=16, visual_grid=3)


@pytest.fixture
def encoded(encoder):
    made = []
    for number, images in enumerate((1, 0, 2)):
        sample, files = make_sample(number, images=images, words=4 + number, source=("beta", "alpha", "beta")[number])
        tokens = len(render(sample.messages, encoder.tokenizer, visual_tokens=[9] * images).input_ids)
        made.append(encoder(sample, files, expected_tokens=tokens))
    return made


def row(encoded, **changes):
    settings = {"row_tokens": 256, "pad_id": 5, "image_size": 16, "visual_tokens": 9, "sources": ("alpha", "beta"), "step": 4}
    return collate(encoded, **{**settings, **changes})


def test_a_row_is_its_samples_end_to_end_then_padding(encoded):
    batch, lengths = row(encoded), [len(sample.input_ids) for sample in encoded]
    used = sum(lengths)
    assert batch.cu_seqlens.tolist() == [0, lengths[0], lengths[0] + lengths[1], used, 256]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.tolist() == [[i for sample in encoded for i in sample.input_ids.tolist()] + [5] * (256 - used)]
    assert batch.position_ids.tolist() == [[i for length in [*lengths, 256 - used] for i in range(length)]]
    assert batch.source_ids.tolist() == [[1] * lengths[0] + [0] * lengths[1] + [1] * lengths[2] + [0] * (256 - used)]
    assert batch.max_seqlen == max(*lengths, 256 - used)
    assert (batch.keys, batch.sources, batch.step, batch.tokens) == (("s00000", "s00001", "s00002"), ("alpha", "beta"), 4, used)


def test_images_and_their_tokens_agree(encoded, encoder):
    batch = row(encoded)
    assert batch.pixel_values.shape == (3, 3, 16, 16)
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.visual_tokens == 27 == int((batch.input_ids == encoder.tokenizer.image_id).sum())


def test_no_label_crosses_a_border_and_padding_is_never_learned(encoded):
    batch = row(encoded)
    assert (batch.labels[0, batch.cu_seqlens[:-1]] == IGNORE_INDEX).all()
    assert (batch.labels[0, batch.tokens :] == IGNORE_INDEX).all()
    learned = batch.labels != IGNORE_INDEX
    assert batch.supervised_tokens == int(learned.sum()) == sum(int((s.labels != IGNORE_INDEX).sum()) for s in encoded) > 0
    assert (batch.labels[learned] == batch.input_ids[learned]).all()


def test_the_parents_way_is_one_segment_with_positions_running_on(encoded):
    batch = row(encoded, isolate=False)
    assert batch.cu_seqlens.tolist() == [0, batch.tokens, 256]
    assert batch.position_ids[0, : batch.tokens].tolist() == list(range(batch.tokens))
    assert torch.equal(batch.labels, row(encoded).labels)


def test_a_full_row_has_no_padding_segment_and_an_empty_one_nothing_else(encoded):
    used = sum(len(sample.input_ids) for sample in encoded)
    assert row(encoded, row_tokens=used).cu_seqlens[-1] == used
    assert len(row(encoded, row_tokens=used).cu_seqlens) == 4
    empty = row([], faults={"a/checksum": 2})
    assert empty.cu_seqlens.tolist() == [0, 256]
    assert (empty.tokens, empty.visual_tokens, empty.supervised_tokens, empty.keys) == (0, 0, 0, ())
    assert empty.pixel_values.shape == (0, 3, 16, 16)
    assert empty.faults == {"a/checksum": 2}


def test_another_length_than_planned_is_a_length_drift(encoder):
    sample, files = make_sample(0)
    with pytest.raises(DataFault, match=r"length_drift: s00000: .* planned with 7"):
        encoder(sample, files, expected_tokens=7)


def test_moving_a_batch_keeps_everything_but_the_device(encoded):
    moved = to_device(row(encoded), torch.device("meta"))
    assert moved.input_ids.device.type == moved.pixel_values.device.type == "meta"
    assert moved.keys == row(encoded).keys
