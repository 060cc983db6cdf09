from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from infimed.contracts import Images, UserError, borders
from infimed.models.attention import attention
from infimed.models.generate import generate
from infimed.models.language import qwen3
from infimed.models.projector import BlockPoolMLP
from infimed.models.vision import NaflexTower
from infimed.models.vlm import InfiMed
from infimed.processing.resolution import Resolution
from tests.conftest import IMAGE_ID, noise

TOLERANCE = 3e-4  # logits are up to 25; measured worst case over 40 seeds: 3.1e-5 batched or alone, 5.2e-5 decoded or packed


def square(make_model) -> InfiMed:
    return loud(make_model())


def any_aspect() -> InfiMed:
    """Images of any shape: 2 x 2 patches a token."""
    vision = NaflexTower(patch_size=7, num_patches=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    language = qwen3(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    resolution = Resolution(patch_size=7, pool=2, min_visual_tokens=1, max_visual_tokens=12)
    projector = BlockPoolMLP(in_features=32, out_features=32, pool=2)
    return loud(InfiMed(resolution=resolution, vision=vision, projector=projector, language=language, image_token_id=IMAGE_ID))


def loud(model: InfiMed) -> InfiMed:
    """Weights so large that a padded position, if it were seen, would change the answer."""
    torch.manual_seed(2)  # one that does not say the same word again and again
    for matrix in (p for p in model.parameters() if p.ndim == 2):
        torch.nn.init.normal_(matrix, std=0.5)
    head = torch.randn(64, 32)  # tied, it would say the last word again and again
    head[IMAGE_ID] = 0  # never said: the training path would look for its image
    model.language.lm_head.weight = torch.nn.Parameter(head)
    return model.eval()


def conversation(model: InfiMed, length: int, *grids: tuple[int, int]) -> tuple[list[int], Images]:
    """Lay images into a prompt of `length` random tokens, from its third token on, one word apart."""
    words = torch.randint(0, IMAGE_ID, (length,)).tolist()
    shown = [id for grid in grids for id in [*[IMAGE_ID] * model.resolution.tokens(grid), 5]]
    return [*words[:2], *shown, *words[2:]], noise(*grids)


def batch_of(model: InfiMed, *rows: tuple) -> tuple[list[list[int]], list[Images]]:
    prompts, images = zip(*(conversation(model, *row) for row in rows), strict=True)
    return list(prompts), list(images)


def small_batch(model: InfiMed) -> tuple[list[list[int]], list[Images]]:
    return batch_of(model, (5,), (12, (4, 4)), (9,))


@contextmanager
def heard(model: InfiMed) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Collect what the output head reads and says."""
    read, said = [], []

    def note(_, given, out) -> None:
        read.append(given[0].clone())
        said.append(out.clone())

    hook = model.language.get_output_embeddings().register_forward_hook(note)
    try:
        yield read, said
    finally:
        hook.remove()


def answers(model: InfiMed, prompts: Sequence, images: Sequence, **changes) -> list[list[int]]:
    return generate(model, prompts, images, **{"max_new_tokens": 8, "stop_ids": (), "pad_id": 0, **changes})


def logits(model: InfiMed, prompts: Sequence, images: Sequence, **changes) -> tuple[list[list[int]], torch.Tensor]:
    """Return answers and float[B, steps, V]."""
    with heard(model) as (_, said):
        result = answers(model, prompts, images, **changes)
    return result, torch.stack(said, dim=1)


def packed_logits(model: InfiMed, ids: list[int], images: Images) -> torch.Tensor:
    """Read a conversation the way that training does: float[T, V]."""
    row = torch.tensor([ids])
    with torch.no_grad():
        hidden = model.hidden(
            row,
            images,
            position_ids=torch.arange(len(ids)).unsqueeze(0),
            cu_seqlens=borders([len(ids)]),
            max_seqlen=len(ids),
        )
        return model.language.lm_head(hidden)[0]


WIDE, TALL, SMALL = (2, 8), (6, 2), (2, 2)
SQUARE = (4, 4)


def check_batch(model: InfiMed, *rows: tuple) -> float:
    prompts, images = batch_of(model, *rows)
    together, logits_BSV = logits(model, prompts, images)
    worst = 0.0
    for row, (prompt, seen) in enumerate(zip(prompts, images, strict=True)):
        alone, alone_1SV = logits(model, [prompt], [seen])
        assert together[row] == alone[0]
        worst = max(worst, (logits_BSV[row] - alone_1SV[0]).abs().max().item())
    return worst


def test_batched_answers_and_logits_equal_one_by_one_with_square_images(make_model):
    assert check_batch(square(make_model), (5,), (3, SQUARE), (60,), (9, SQUARE, SQUARE), (2, SQUARE)) < TOLERANCE


def test_batched_answers_and_logits_equal_one_by_one_with_images_of_any_shape():
    assert check_batch(any_aspect(), (9, WIDE), (2,), (50, SMALL, TALL), (4, WIDE, TALL, SMALL), (70,)) < TOLERANCE


@pytest.mark.parametrize("kind", ["square", "any aspect"])
def test_every_decoding_step_says_what_the_training_forward_says(make_model, kind):
    """The decoding path (cache, stock attention) and the training path (packed attention) are one model."""
    model = square(make_model) if kind == "square" else any_aspect()
    rows = ((9, SQUARE), (3,)) if kind == "square" else ((9, WIDE, TALL), (3, SMALL))
    prompts, images = batch_of(model, *rows)
    result, logits_BSV = logits(model, prompts, images)
    for row, (prompt, seen) in enumerate(zip(prompts, images, strict=True)):
        taught = packed_logits(model, prompt + result[row], seen)[len(prompt) - 1 : -1]
        assert taught.argmax(1).tolist() == result[row]
        assert (taught - logits_BSV[row]).abs().max() < TOLERANCE


def test_answers_and_logits_equal_those_of_transformers_generate():
    model = any_aspect()
    prompts, images = batch_of(model, (9, WIDE), (2,), (50, SMALL, TALL))
    result, logits_BSV = logits(model, prompts, images)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad(), attention(model.language, "sdpa"):
        plain = model.language.generate(
            inputs_embeds=model.embed(ids, Images.join(images, patch_dim=3 * 7**2)),
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert plain.sequences.tolist() == result
    assert (torch.stack(plain.logits, dim=1) - logits_BSV).abs().max() == 0  # the same operations in the same order


def test_an_answer_ends_before_its_first_stop(make_model):
    model = square(make_model)
    prompts, images = small_batch(model)
    free = answers(model, prompts, images)
    for stop in (free[0][3], free[1][0], free[2][7]):
        expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
        assert answers(model, prompts, images, stop_ids=(stop,)) == expected
    assert all(len(ids) == 3 for ids in answers(model, prompts, images, max_new_tokens=3))


def test_an_answer_ends_before_a_run_of_stop_tokens_and_not_at_a_part_of_it(make_model):
    model = square(make_model)
    prompts, images = small_batch(model)
    free = answers(model, prompts, images)
    run = free[1][2:5]
    assert len(set(run)) == 3
    assert answers(model, prompts, images, stop_sequences=[run])[1] == free[1][:2]
    assert answers(model, prompts, images, stop_sequences=[[*run[:2], -1], [*free[1][6:], -1]]) == free
    assert answers(model, prompts, images, stop_sequences=[run[1:], run])[1] == free[1][:2]  # the longer one counts


def test_tokens_are_handed_on_step_by_step_and_are_those_of_the_result(make_model):
    model = square(make_model)
    prompts, images = small_batch(model)
    free = answers(model, prompts, images)
    told: list[tuple[int, int]] = []
    answers(model, prompts, images, on_token=lambda *token: told.append(token))
    assert told == [(row, free[row][step]) for step in range(8) for row in range(3)]


def test_no_token_is_handed_on_that_a_stop_takes_back(make_model):
    model = square(make_model)
    prompts, images = small_batch(model)
    free = answers(model, prompts, images)[1]
    for stops in ([free[2:5]], [[*free[2:4], -1]], [[*free[6:], -1]], [free[1:3], [*free[2:6], -1]]):
        told: list[int] = []
        (result,) = answers(model, prompts[1:2], images[1:2], stop_sequences=stops, on_token=lambda _, token, to=told: to.append(token))
        assert told == result


def test_a_stop_of_equal_tokens_takes_back_all_of_them(make_model):
    model = square(make_model)
    words = model.language.get_input_embeddings().weight
    words.data *= 1000
    model.language.lm_head.weight = words  # loud and tied: the last word over and over
    prompts, images = small_batch(model)
    word, *more = answers(model, prompts, images)[0]
    assert set(more) == {word}
    for length in (3, 8):
        told: list[int] = []
        settings = {"stop_sequences": [[word] * length], "on_token": lambda _, token, to=told: to.append(token)}
        assert answers(model, prompts[:1], images[:1], **settings) == [[]]
        assert told == []


def test_ended_rows_leave_the_batch_and_the_last_one_ends_the_call(make_model):
    model = square(make_model)
    prompts, images = small_batch(model)
    free = answers(model, prompts, images)
    stops = {ids[1 + 2 * row] for row, ids in enumerate(free)}
    ends = [next(at for at, id in enumerate(ids) if id in stops) for ids in free]
    with heard(model) as (read, _):
        answers(model, prompts, images, stop_ids=tuple(stops))
    assert [len(rows) for rows in read] == [sum(end >= step for end in ends) for step in range(max(ends) + 1)]
    assert len(read) < 8


def test_logits_are_computed_for_the_last_position_alone(make_model):
    model = square(make_model)
    with heard(model) as (read, _):
        answers(model, *small_batch(model))
    assert {tuple(rows.shape) for rows in read} == {(3, 32)}


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_attention_are_afterwards_what_they_were(make_model, fails):
    model = square(make_model).train()
    model.language.model.layers[0].eval()  # such as a frozen part
    modes = [module.training for module in model.modules()]
    before = model.language.config._attn_implementation

    def stop(*_) -> None:
        assert not model.training
        raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            answers(model, *small_batch(model), on_token=stop)
    else:
        answers(model, *small_batch(model))
    assert [module.training for module in model.modules()] == modes
    assert model.language.config._attn_implementation == before
    assert not torch.is_inference_mode_enabled()
    assert model.language.lm_head.weight.requires_grad


def test_blocks_compiled_for_training_are_not_compiled_again(make_model):
    model = square(make_model)
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    prompts, images = small_batch(model)
    expected = answers(model, prompts, images)
    for block in model.language.model.layers:
        block.compile(backend=backend)
    assert answers(model, prompts, images) == expected
    assert not compiled
    packed_logits(model, prompts[0], images[0])
    assert compiled  # and afterwards they are compiled as ever


def test_half_precision_runs_on_a_cpu():
    model = any_aspect().bfloat16()
    result, logits_BSV = logits(model, *batch_of(model, (9, WIDE), (2,), (50, SMALL, TALL)))
    assert [len(ids) for ids in result] == [8] * 3
    assert logits_BSV.dtype == torch.bfloat16
    assert logits_BSV.isfinite().all()


def test_what_cannot_be_answered_is_refused_with_its_numbers():
    model = any_aspect()
    words = list(range(10))
    for count in (0, -1, 2.5):
        with pytest.raises(UserError, match=f"max_new_tokens={count}: expected a whole number, at least 1"):
            answers(model, [words], [noise()], max_new_tokens=count)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        answers(model, [words, []], [noise(), noise()])
    long = list(range(10)) * 25
    assert len(answers(model, [long[:248]], [noise()])[0]) == 8
    with pytest.raises(UserError, match="prompt 0 has 249 tokens, with max_new_tokens=8 it makes more than the 256 that the model reads"):
        answers(model, [long[:249]], [noise()])
    assert answers(model, [], []) == []


def test_an_image_cannot_answer_for_another_prompts_placeholders(make_model):
    model = square(make_model)
    prompts, images = small_batch(model)
    with pytest.raises(ValueError, match="prompt 0 holds 0 image tokens, but its 1 images make 4"):
        answers(model, prompts, [images[1], images[0], images[2]])
