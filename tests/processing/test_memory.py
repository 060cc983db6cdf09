import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, SiglipVisionConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from infimed.contracts import UserError
from infimed.processing.flops import LanguageShape, ModelShape, ProjectorShape, VisionShape, Work
from infimed.processing.memory import GIB, RECIPES, Memory, MemoryPlan, language_block_bytes, memory, vision_block_bytes

SMALL = LanguageShape(layers=28, width=2048, intermediate=6144, heads=16, kv_heads=8, head_dim=128, vocab=151_936)
LARGE = LanguageShape(layers=36, width=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128, vocab=151_936)
TOWER = VisionShape(layers=27, width=1152, intermediate=4304, heads=16, patch_dim=588, positions=729)
ALL, FROZEN_TOWER = ("vision", "projector", "language"), ("projector", "language")
TOKENS = 16


def _model(language: LanguageShape) -> ModelShape:
    """Join the parts as the reference's tables do: 27 tower blocks, 2 x 2 patches a token."""
    projector = ProjectorShape.mlp(inputs=4 * 1152, hidden=language.width, outputs=language.width)
    return ModelShape(vision=TOWER, projector=projector, language=language)


def _kept(block: nn.Module, width: int, *, compiled: bool, call: Callable[[nn.Module, torch.Tensor], object]) -> float:
    """Count the bytes a token that a bf16 block of no particular weights keeps for backward on the CPU, each storage once."""
    block = block.to(torch.bfloat16).to_empty(device="cpu")
    weights = {p.untyped_storage()._cdata for p in block.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(kept: torch.Tensor) -> torch.Tensor:
        storage = kept.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return kept

    torch._dynamo.reset()
    runs = torch.compile(block, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else block
    before = torch.zeros(1, TOKENS, width, dtype=torch.bfloat16, requires_grad=True) * 1  # * 1: not a leaf, as inside a model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        call(runs, before)
    return sum(storage.nbytes() for storage in storages.values()) / TOKENS


def _decoder_block(shape: LanguageShape, *, trained: bool, compiled: bool) -> float:
    config = Qwen3Config(
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        attn_implementation="sdpa",  # keeps what a flash kernel keeps: query, key, value, output, log-sum-exp
    )
    cos, sin = (torch.ones(1, TOKENS, shape.head_dim, dtype=torch.bfloat16) for _ in range(2))
    with torch.device("meta"):
        block = Qwen3DecoderLayer(config, 0).requires_grad_(trained)
    return _kept(
        block,
        shape.width,
        compiled=compiled,
        call=lambda block, x: block(x, attention_mask=None, position_embeddings=(cos, sin)),
    )


@pytest.mark.parametrize(
    ("shape", "compiled", "printed"), [(SMALL, False, 110.6), (SMALL, True, 70.6), (LARGE, False, 166.7), (LARGE, True, 107.7)]
)
def test_a_trained_decoder_block_keeps_the_bytes_that_torch_keeps(shape, compiled, printed):
    saved = "compiled" if compiled else "eager"
    rope = 4 * shape.head_dim  # two bf16 tables, kept once for all blocks
    found = language_block_bytes(shape, saved, trained=True) + rope
    assert found == _decoder_block(shape, trained=True, compiled=compiled)
    assert round((found - 4 * shape.heads) / 1024, 1) == printed  # the reference measured with an attention that keeps no log-sum-exp


@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_decoder_block_in_the_gradients_way_keeps_the_bytes_that_torch_keeps(compiled):
    found = language_block_bytes(SMALL, "compiled" if compiled else "eager", trained=False) + 4 * SMALL.head_dim
    assert found == _decoder_block(SMALL, trained=False, compiled=compiled)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_trained_tower_block_keeps_the_bytes_that_torch_keeps(compiled):
    config = SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, attn_implementation="sdpa")
    with torch.device("meta"):
        block = SiglipEncoderLayer(config)
    kept = _kept(block, 1152, compiled=compiled, call=lambda block, x: block(x, None))
    found = vision_block_bytes(TOWER, "compiled" if compiled else "eager")
    assert found == kept + 8  # the CPU keeps the norms' four statistics in bf16
    assert found / 1024 == pytest.approx(34.8, abs=0.1)


# From here on, tables of the reference, to the digits that it prints.


@pytest.mark.parametrize(
    ("shape", "eager", "compiled", "products", "full"),
    [
        (SMALL, (24.2, 48.4), (15.4, 30.9), (9.6, 19.2), 1.75),
        (LARGE, (46.9, 93.7), (30.3, 60.6), (19.1, 38.2), 2.8),
    ],
)
def test_a_rows_activations_are_what_the_reference_prints(shape, eager, compiled, products, full):
    rope, lse = 4 * shape.head_dim, 4 * shape.heads  # the reference counts the RoPE tables in every layer and the log-sum-exp in none
    for saved, printed, more in (("eager", eager, rope - lse), ("compiled", compiled, rope - lse), ("products", products, -lse)):
        block = language_block_bytes(shape, saved, trained=True) + more
        assert tuple(round(shape.layers * block * tokens / GIB, 1) for tokens in (8192, 16_384)) == printed
    assert language_block_bytes(shape, "products", trained=True) - lse == 1024 * (44 if shape is SMALL else 68)
    assert shape.layers * language_block_bytes(shape, "full", trained=True) * 16_384 / GIB == pytest.approx(full, abs=0.02)


@pytest.mark.parametrize(
    ("recipe", "small", "small_frozen", "large", "large_frozen"),
    [
        ("fp32", 32.0, 26.6, 66.4, 61.0),
        ("bf16_fp32_states", 24.0, 20.2, 49.8, 45.9),
        ("bf16_kahan", 20.0, None, 41.5, None),
        ("bf16", 16.0, 13.7, 33.2, 30.9),
        ("bf16_8bit", 12.1, 10.6, 25.1, 23.6),
        ("bf16_host", 4.0, None, 8.3, None),
    ],
)
def test_states_are_what_the_reference_prints(recipe, small, small_frozen, large, large_frozen):
    for shape, trained, printed in (
        (SMALL, ALL, small),
        (SMALL, FROZEN_TOWER, small_frozen),
        (LARGE, ALL, large),
        (LARGE, FROZEN_TOWER, large_frozen),
    ):
        states = memory(_model(shape), Work(), trained=trained, plan=MemoryPlan(recipe=recipe)).states
        assert printed is None or round(states / GIB, 1) == printed


def test_logits_are_what_the_reference_prints():
    def logits(rows: int, each: int, trained: tuple[str, ...] = ("projector",), shape: LanguageShape = SMALL) -> float:
        plan = MemoryPlan(chunk_rows=rows, bytes_per_logit=each)
        return round(memory(_model(shape), Work(tokens=16_384, supervised=16_384), trained=trained, plan=plan).logits / GIB, 2)

    assert [logits(16_384, 2), logits(16_384, 4), logits(2048, 4), logits(4096, 4)] == [4.64, 9.27, 1.16, 2.32]
    assert logits(16_384, 12) == pytest.approx(27.8, abs=0.02)  # transformers' own loss
    assert [logits(1, 0, ALL), logits(1, 0, ALL, LARGE)] == [1.16, 1.45]  # the head's gradient in float32


def test_a_tower_that_learns_keeps_what_the_reference_prints_and_a_frozen_one_nothing():
    work = Work.of(documents=[496] * 33, images=[784] * 33, visual_tokens=196 * 33, supervised=210 * 33)
    assert TOWER.layers * vision_block_bytes(TOWER, "eager") / 2**20 == pytest.approx(0.92, abs=0.005)  # MiB a patch
    for images, printed in ((33, 23), (55, 39)):
        assert round(images * 784 * TOWER.layers * vision_block_bytes(TOWER, "eager") / GIB) == printed
    kept = {
        saved: memory(_model(SMALL), work, trained=ALL, plan=MemoryPlan(vision=saved)).vision for saved in ("eager", "products", "full")
    }
    assert kept["eager"] > kept["products"] > kept["full"] > 0
    assert memory(_model(SMALL), work, trained=FROZEN_TOWER, plan=MemoryPlan(vision="eager")).vision == 0


# Stage x recipe x device of the reference: what is said to fit, and how well. 75 of an H100's 79.6 GiB, 132 of an H200's 139.
FITS = {
    "1.7B, all learn, 16k": (SMALL, ALL, MemoryPlan(recipe="fp32"), 16_384, 33, 75, "yes"),
    "1.7B, tower not checkpointed": (SMALL, ALL, MemoryPlan(recipe="fp32", vision="eager"), 16_384, 33, 75, "no"),
    "4B, frozen tower, bf16, 16k, products": (LARGE, FROZEN_TOWER, MemoryPlan(recipe="bf16", language="products"), 16_384, 33, 75, "close"),
    "4B, frozen tower, bf16, 16k, all kept": (LARGE, FROZEN_TOWER, MemoryPlan(recipe="bf16"), 16_384, 33, 75, "no"),
    "4B, frozen tower, bf16, 8k": (LARGE, FROZEN_TOWER, MemoryPlan(recipe="bf16"), 8192, 16, 75, "yes"),
    "4B, fp32, 8k, all kept": (LARGE, FROZEN_TOWER, MemoryPlan(recipe="fp32"), 8192, 16, 75, "no"),
    "4B, fp32, 8k, all kept, H200": (LARGE, FROZEN_TOWER, MemoryPlan(recipe="fp32"), 8192, 16, 132, "yes"),
    "4B, fp32, 16k, products, H200": (LARGE, FROZEN_TOWER, MemoryPlan(recipe="fp32", language="products"), 16_384, 33, 132, "yes"),
}


def _stage(case: str) -> tuple[Memory, int, str]:
    shape, trained, plan, tokens, images, budget, verdict = FITS[case]
    work = Work.of(documents=[tokens // images] * images, images=[784] * images, visual_tokens=196 * images, supervised=210 * images)
    return memory(_model(shape), work, trained=trained, plan=plan), budget, verdict


@pytest.mark.parametrize("case", FITS)
def test_the_planner_agrees_with_the_reference_on_what_fits(case):
    planned, budget, verdict = _stage(case)
    assert planned.fits(budget * GIB) == verdict, {
        part.name: round(getattr(planned, part.name) / GIB, 2) for part in dataclasses.fields(planned)
    }


def test_the_reference_estimate_of_a_whole_step_lies_in_the_band():
    low, high = _stage("1.7B, all learn, 16k")[0].band
    assert low <= 68 * GIB <= high


def test_states_are_certain_and_the_rest_to_a_tenth():
    planned = Memory(weights=400, gradients=200, optimizer=400, gathered=10, vision=20, projector=30, language=100, logits=40)
    assert (planned.states, planned.total, planned.band) == (1000, 1200, (1180, 1220))
    assert [planned.fits(budget) for budget in (1220, 1219, 1180, 1179)] == ["yes", "close", "close", "no"]


def test_sharding_divides_the_states_and_leaves_whole_blocks_in_flight():
    work = Work.of(documents=[4096], supervised=1000)
    one, many = (memory(_model(SMALL), work, trained=ALL, plan=MemoryPlan(recipe="bf16", shards=n)) for n in (1, 32))
    assert many.states == pytest.approx(one.states / 32, abs=3)
    assert one.gathered == 0 < many.gathered
    assert (one.language, one.logits) == (many.language, many.logits)


def test_freezing_the_language_model_frees_its_states_its_head_gradient_and_part_of_its_activations():
    work = Work.of(documents=[160] * 102, images=[256] * 102, visual_tokens=64 * 102, supervised=96 * 102)
    align, full = (memory(_model(SMALL), work, trained=trained, plan=MemoryPlan()) for trained in (("projector",), FROZEN_TOWER))
    assert align.optimizer == 8 * _model(SMALL).projector.parameters
    assert full.logits - align.logits == 4 * 2048 * 151_936
    assert 0 < align.language < full.language
    nothing = memory(_model(SMALL), work, trained=[], plan=MemoryPlan())
    assert (nothing.language, nothing.projector, nothing.vision, nothing.gradients, nothing.optimizer) == (0, 0, 0, 0, 0)


def test_checkpointing_keeps_less_the_more_it_recomputes():
    work = Work.of(documents=[4096], supervised=1000)
    kept = [
        memory(_model(SMALL), work, trained=ALL, plan=MemoryPlan(language=s)).language for s in ("eager", "compiled", "products", "full")
    ]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"recipe": "fp8"}, r"'fp8': expected one of fp32, "),
        ({"language": "some"}, r"'some' and 'full': expected of eager, compiled, products, full"),
        ({"shards": 0}, r"shards is 0"),
        ({"chunk_rows": 0}, r"chunk_rows 0"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused(choice, message):
    with pytest.raises(UserError, match=message):
        MemoryPlan(**choice)


def test_every_recipe_costs_the_bytes_that_it_is_known_by():
    known = {"fp32": 16, "bf16_fp32_states": 12, "bf16_kahan": 10, "bf16": 8, "bf16_8bit": 6.06, "bf16_host": 2}
    assert {name: recipe.weights + recipe.gradients + recipe.optimizer for name, recipe in RECIPES.items()} == pytest.approx(known)
