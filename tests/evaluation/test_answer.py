import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from infimed.contracts import DataFault, EvalItem, Message
from infimed.evaluation.answer import GREY, LocalModel
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer, train_tokenizer

MODEL = SimpleNamespace(resolution=Resolution(patch_size=7, image_size=28, visual_grid=2))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer(["yes no axial"], vocab_size=300), fingerprint="test")


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 30), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def item(text, *values):
    return EvalItem(text, (Message("user", "<image>" * len(values) + text),), tuple(map(png, values)), "yes", "open")


class Recorder:
    """Stand in for generate: answer with the first pixel of the first image, and keep what it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def __call__(self, model, prompts, images, *, max_new_tokens, stop_ids, pad_id):
        self.calls.append((prompts, images, max_new_tokens, stop_ids, pad_id))
        return [self.tokenizer.encode(f" {int(i.patches[0, 0])}" if len(i) else "none") for i in images]


def test_responses_come_back_in_order_whatever_the_batches(tokenizer):
    items = [item("long " * (7 - i % 3), i) for i in range(9)]
    generate = Recorder(tokenizer)
    assert LocalModel(MODEL, tokenizer, batch_size=4, generate=generate)(items) == [str(i) for i in range(9)]
    assert [len(prompts) for prompts, *_ in generate.calls] == [4, 4, 1]
    lengths = [len(p) for prompts, *_ in generate.calls for p in prompts]
    assert lengths == sorted(lengths)


def test_the_prompt_has_one_run_of_visual_tokens_an_image_and_the_pixels_the_models_size(tokenizer):
    generate = Recorder(tokenizer)
    answers = LocalModel(MODEL, tokenizer, max_new_tokens=5, generate=generate)([item("Equal?", 9, 8), item("Text only?")])
    [(prompts, images, max_new_tokens, stop_ids, pad_id)] = generate.calls
    assert answers == ["9", "none"]
    assert [p.count(tokenizer.image_id) for p in prompts] == [0, 2 * 2**2]
    assert [i.grids for i in images] == [(), ((4, 4), (4, 4))]
    assert (max_new_tokens, stop_ids, pad_id) == (5, (tokenizer.im_end_id, tokenizer.pad_id), tokenizer.pad_id)


def test_the_blind_model_sees_grey_in_the_same_number_of_tokens(tokenizer):
    seeing, blind = Recorder(tokenizer), Recorder(tokenizer)
    LocalModel(MODEL, tokenizer, generate=seeing)([item("Axial?", 9)])
    assert LocalModel(MODEL, tokenizer, blind=True, generate=blind)([item("Axial?", 9)]) == [str(GREY)]
    assert blind.calls[0][0] == seeing.calls[0][0]
    assert set(blind.calls[0][1][0].patches.flatten().tolist()) == {GREY}


def test_an_image_that_cannot_be_decoded_is_a_fault_not_an_answer(tokenizer):
    broken = EvalItem("x", (Message("user", "<image>?"),), (b"no image",), "yes", "open")
    with pytest.raises(DataFault, match="undecodable_image"):
        LocalModel(MODEL, tokenizer, generate=Recorder(tokenizer))([broken])
