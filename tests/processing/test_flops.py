import ast
import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from infimed.contracts import COMPONENTS, UserError
from infimed.processing import flops as module
from infimed.processing.flops import (
    LanguageShape,
    ModelShape,
    ProjectorShape,
    VisionShape,
    Work,
    describe,
    flops,
    mfu,
    peak_tflops,
    prices,
    shape_of,
    six_nd,
)

SMALL = LanguageShape(layers=28, width=2048, intermediate=6144, heads=16, kv_heads=8, head_dim=128, vocab=151_936)
LARGE = LanguageShape(layers=36, width=2560, intermediate=9728, heads=32, kv_heads=8, head_dim=128, vocab=151_936)
TOWER = VisionShape(layers=27, width=1152, intermediate=4304, heads=16, patch_dim=588, positions=729)
TINY = ModelShape(
    vision=VisionShape(layers=3, width=48, intermediate=80, heads=4, patch_dim=3 * 14**2, positions=16),
    projector=ProjectorShape.mlp(inputs=48, hidden=72, outputs=64),
    language=LanguageShape(layers=2, width=64, intermediate=96, heads=4, kv_heads=2, head_dim=24, vocab=320),
)
ALL, FROZEN_TOWER = COMPONENTS, ("projector", "language")
SUBSETS = [subset for size in range(4) for subset in itertools.combinations(COMPONENTS, size)]


def _model(language: LanguageShape, *, fold: int = 4, tower: VisionShape = TOWER) -> ModelShape:
    """Join the parts; 2 x 2 patches make a token, as in the tables of the reference, unless told otherwise."""
    projector = ProjectorShape.mlp(inputs=1152 * fold, hidden=language.width, outputs=language.width)
    return ModelShape(vision=tower, projector=projector, language=language)


@functools.cache
def _qwen3(shape: LanguageShape) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
        attn_implementation="eager",  # plain matrix products, which the counter can see
    )
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


@functools.cache
def _siglip(shape: VisionShape, *, image_size: int) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        image_size=image_size,
        patch_size=14,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vision_use_head=False,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return SiglipVisionModel(config)


def _decode(model: Qwen3ForCausalLM, *, batch: int, length: int, supervised: int, embeds: torch.Tensor | None = None) -> torch.Tensor:
    """Read `batch` documents of `length` and score `supervised` rows; the attention mask is built outside and counts nothing."""
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta") if embeds is None else None
    hidden = model.model(input_ids=ids, inputs_embeds=embeds, use_cache=False, attention_mask={"full_attention": None}).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[:supervised])


def _rope(shape: LanguageShape, *, length: int) -> int:
    """Count RoPE's outer product of positions and frequencies: a bmm in some releases of transformers, elementwise in others."""
    rope = _qwen3(dataclasses.replace(shape, layers=1, vocab=8)).model.rotary_emb
    with FlopCounterMode(display=False) as counter:
        rope(torch.empty(1, device="meta"), torch.zeros(1, length, dtype=torch.long, device="meta"))
    assert counter.get_total_flops() in (0, shape.head_dim * length)
    return counter.get_total_flops()


def _upper_triangle(shape: LanguageShape, *, batch: int, length: int) -> int:
    """Operations of one forward above the diagonal, which the counter counts and a causal kernel skips."""
    return 2 * shape.layers * shape.heads * shape.head_dim * batch * length * (length - 1)


@pytest.mark.parametrize(("shape", "layers", "trained"), [(SMALL, 28, True), (LARGE, 36, True), (SMALL, 2, False), (LARGE, 2, False)])
def test_the_decoder_at_its_real_widths_costs_what_torch_counts_to_the_last_operation(shape, layers, trained):
    shape = dataclasses.replace(shape, layers=layers)
    batch, length, supervised = 2, 160, 100
    work = Work.of(documents=[length] * batch, supervised=supervised)
    model = _qwen3(shape).requires_grad_(trained)
    embeds = None if trained else torch.empty(batch, length, shape.width, device="meta", requires_grad=True)  # a projector below it learns
    above, rope = _upper_triangle(shape, batch=batch, length=length), _rope(shape, length=length)
    ours = flops(_model(shape), work, trained=["language"] if trained else ["projector"])
    with FlopCounterMode(display=False) as counter:
        loss = _decode(model, batch=batch, length=length, supervised=supervised, embeds=embeds).sum()
        assert counter.get_total_flops() - above - rope == ours.language.forward + ours.head.forward
        loss.backward()
    assert counter.get_total_flops() - 3 * above - rope == ours.total


@pytest.mark.parametrize(("image_size", "layers", "trained"), [(384, 27, True), (224, 2, True), (384, 2, False)])
def test_siglip_at_its_real_widths_costs_what_torch_counts_to_the_last_operation(image_size, layers, trained):
    patches, images, shape = (image_size // 14) ** 2, 2, dataclasses.replace(TOWER, layers=layers)
    model = _siglip(shape, image_size=image_size).requires_grad_(trained)
    work = Work(images=images, patches=images * patches, patch_pairs=images * patches**2)
    ours = flops(_model(SMALL, tower=shape), work, trained=["vision"] * trained)
    with FlopCounterMode(display=False) as counter:
        features = model(torch.empty(images, 3, image_size, image_size, device="meta")).last_hidden_state
        assert counter.get_total_flops() == ours.vision.forward
        if trained:
            features.sum().backward()
    assert counter.get_total_flops() == ours.vision.total == ours.total


@pytest.mark.parametrize("trained", SUBSETS, ids=lambda subset: "+".join(subset) or "nothing")
def test_the_joined_model_costs_what_torch_counts_whichever_parts_learn(trained):
    shape, images, text, supervised = TINY, 3, 10, 17
    tower, reader = _siglip(shape.vision, image_size=56), _qwen3(shape.language)
    projector = nn.Sequential(nn.Linear(48, 72), nn.GELU(), nn.Linear(72, 64)).to("meta")
    for name, part in zip(COMPONENTS, (tower, projector, reader), strict=True):
        part.requires_grad_(name in trained)
    length = 16 + text
    work = Work.of(documents=[length] * images, images=[16] * images, visual_tokens=16 * images, supervised=supervised)
    spare = _upper_triangle(shape.language, batch=images, length=length)
    rope = _rope(shape.language, length=length)
    with FlopCounterMode(display=False) as counter:
        seen = projector(tower.encoder(inputs_embeds=tower.embeddings(torch.empty(images, 3, 56, 56, device="meta"))).last_hidden_state)
        words = reader.get_input_embeddings()(torch.zeros(images, text, dtype=torch.long, device="meta"))
        loss = _decode(reader, batch=images, length=length, supervised=supervised, embeds=torch.cat([seen, words], 1)).sum()
        if trained:
            loss.backward()
    ours = flops(shape, work, trained=trained)
    assert counter.get_total_flops() - spare * (3 if trained else 1) - rope == ours.total


def test_a_norm_that_learns_below_the_projector_costs_its_first_layer_an_input_gradient():
    layers = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 72), nn.GELU(), nn.Linear(72, 64)).to("meta")
    shape = dataclasses.replace(TINY, projector=ProjectorShape.mlp(inputs=192, hidden=72, outputs=64, pre_norm=True))
    with FlopCounterMode(display=False) as counter:
        layers(torch.empty(5, 192, device="meta")).sum().backward()
    assert flops(shape, Work(visual_tokens=5), trained=["projector"]).total == counter.get_total_flops()
    assert shape.projector.parameters == sum(p.numel() for p in layers.parameters())


def test_packed_documents_cost_their_own_triangles():
    def attention(documents: list[int]) -> int:
        return flops(_model(SMALL), Work.of(documents=documents), trained=["language"]).language_attention.total

    assert attention([700, 300]) == attention([700]) + attention([300])
    assert attention([1]) == 3 * 28 * 4 * 16 * 128  # a token sees itself: two products of its query, forward once and backward twice
    packed, dense = attention([2048] * 8), 3 * 28 * 4 * 16 * 128 * 16_384**2
    assert dense / packed == pytest.approx(16, rel=1e-3)  # eight segments, half of each


def test_the_work_of_two_rows_is_the_sum_of_both():
    one = Work.of(documents=[100, 60], images=[16, 16], visual_tokens=32, supervised=40)
    two = Work.of(documents=[7])
    assert sum([one, two], start=Work()) == one + two
    assert one + two == Work.of(documents=[100, 60, 7], images=[16, 16], visual_tokens=32, supervised=40)
    a, b, both = (flops(TINY, work, trained=ALL) for work in (one, two, one + two))
    assert a.total + b.total == both.total


def test_aligning_the_projector_alone_costs_two_thirds_of_the_decoder_and_no_backward_of_the_tower():
    work = Work.of(documents=[160] * 102, images=[256] * 102, visual_tokens=64 * 102, supervised=96 * 102)
    align, full = (flops(_model(SMALL), work, trained=trained) for trained in (("projector",), ALL))
    assert 3 * align.language_products.total == 2 * full.language_products.total
    assert 3 * align.head.total == 2 * full.head.total
    assert align.language_attention == full.language_attention
    assert align.vision.backward == 0
    assert align.vision.forward == full.vision.forward
    assert align.head.forward == 2 * 2048 * 151_936 * work.supervised
    projector = align.projector
    assert projector.backward == projector.forward + 2 * 2048 * 2048 * work.visual_tokens  # weights of both, input of the second alone


def test_evaluation_has_no_backward():
    cost = flops(TINY, Work.of(documents=[20], images=[16], visual_tokens=16, supervised=3), trained=[])
    assert [getattr(cost, part.name).backward for part in dataclasses.fields(cost)] == [0] * 6
    assert min(getattr(cost, part.name).forward for part in dataclasses.fields(cost)) > 0


def test_parameters_are_those_of_the_published_sizes():
    for shape, exact, billions in ((SMALL, 1_720_574_976, 1.7206), (LARGE, 4_022_468_096, 4.0225)):
        assert shape.parameters == exact == sum(p.numel() for p in _qwen3(shape).parameters())
        assert round(exact / 1e9, 4) == billions
    run = dataclasses.replace(TOWER, layers=26)
    stock = _siglip(run, image_size=384)
    assert run.parameters == sum(p.numel() for p in stock.parameters()) - sum(p.numel() for p in stock.post_layernorm.parameters())
    for width, exact in ((2048, 6_557_696), (2560, 9_507_840)):
        assert ProjectorShape.mlp(inputs=1152, hidden=width, outputs=width).parameters == exact


# From here on, tables of the reference, to the digits that it prints.


def test_a_token_costs_what_the_reference_prints():
    for shape, body, head in ((SMALL, 2.819, 0.622), (LARGE, 7.267, 0.778)):
        cost = flops(_model(shape), Work(tokens=1, supervised=1), trained=[])
        assert (round(cost.language_products.forward / 1e9, 3), round(cost.head.forward / 1e9, 3)) == (body, head)


# The reference prints 131 for the third attention: 130.46 rounded up.
@pytest.mark.parametrize(
    ("patches", "patch_side", "forward", "attention", "thrice"),
    [(256, 14, 219, 8, 657), (729, 14, 666, 66, 1_999), (1_024, 16, 974, 130, 2_922), (4_096, 14, 5_460, 2_087, 16_381)],
)
def test_an_image_costs_what_the_reference_prints(patches, patch_side, forward, attention, thrice):
    model = _model(SMALL, tower=dataclasses.replace(TOWER, patch_dim=3 * patch_side**2))
    cost = flops(model, Work(images=1, patches=patches, patch_pairs=patches**2), trained=["vision"])
    giga = [round(x / 1e9) for x in (cost.vision.forward, cost.vision_attention.forward, 3 * cost.vision.forward)]
    assert giga == [forward, attention, thrice]
    # Its training column is three times forward; the gradient of the pixels, which nobody needs, is not in ours.
    assert cost.vision.total == 3 * cost.vision.forward - 2 * 1152 * 3 * patch_side**2 * patches


@pytest.mark.parametrize(
    ("shape", "documents", "per_token", "floor_989", "floor_790", "ceiling"),
    [
        (SMALL, [2048] * 8, 11.03, 183, 229, 71.6),
        (SMALL, [16_384], 15.96, 264, 331, 49.5),
        (LARGE, [2048] * 8, 25.95, 430, 538, 30.4),
        (LARGE, [16_384], 38.63, 640, 801, 20.5),
    ],
)
def test_a_row_of_text_costs_what_the_reference_prints(shape, documents, per_token, floor_989, floor_790, ceiling):
    total = flops(_model(shape), Work.of(documents=documents, supervised=16_384), trained=["language"]).total
    assert round(total / 16_384 / 1e9, 2) == per_token
    assert [round(total / peak / 1e9) for peak in (989, 790)] == [floor_989, floor_790]  # ms
    assert round(16_384 / (total / 790e12) / 1e3, 1) == ceiling  # thousand tokens a second


# Stage -> documents, tokens of each; images, patches and tokens of each; supervised tokens; what learns;
# then for 1.7B and 4B: TFLOP, ms at 790 TFLOP/s, 6ND over the truth; last the tower's share of forward at 1.7B (None: not printed).
# Supervised rows are printed for one stage only; the others are those that give every printed figure of their line at once:
# all text of S1, half of SFT, nine tenths of the text-heavy one, whose tower is frozen.
STAGES = {
    "S1 align": (102, 160, 102, 256, 64, 96 * 102, ("projector",), (127.8, 162, 1.64), (277.6, 351, 1.57), 0.30),
    "S2 full": (33, 496, 33, 784, 196, 210 * 33, ALL, (226.1, 286, 0.93), (452.4, 573, 0.97), 0.32),
    "S2 tower frozen": (33, 496, 33, 784, 196, 210 * 33, FROZEN_TOWER, (178.4, 226, 1.18), (404.6, 512, 1.08), None),
    "SFT 5 tiles": (11, 1380, 55, 784, 196, 200 * 11, ALL, (259.6, 329, 0.75), (474.9, 601, 0.85), 0.46),
    "SFT 5 tiles, tower frozen": (11, 1380, 55, 784, 196, 200 * 11, FROZEN_TOWER, (180.1, 228, 1.09), (395.3, 500, 1.03), None),
    "SFT text-heavy": (8, 1996, 8, 784, 196, 1620 * 8, FROZEN_TOWER, (176.1, 223, 1.17), (412.5, 522, 1.03), 0.09),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_costs_what_the_reference_prints(stage):
    count, length, images, patches, tokens, supervised, trained, *printed, share = STAGES[stage]
    work = Work.of(documents=[length] * count, images=[patches] * images, visual_tokens=tokens * images, supervised=supervised)
    for shape, expected in zip((SMALL, LARGE), printed, strict=True):
        cost = flops(_model(shape), work, trained=trained)
        found = (round(cost.total / 1e12, 1), round(cost.total / 790e9), round(six_nd(_model(shape), work) / cost.total, 2))
        assert found == expected
        forward = cost.vision.forward + cost.projector.forward + cost.language.forward + cost.head.forward
        assert shape is LARGE or share is None or round(cost.vision.forward / forward, 2) == share


def test_a_device_is_known_by_its_name_and_a_slice_of_one_is_not():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA H20", "cpu")
    assert [peak_tflops(name) for name in names] == [989.0, 756.0, 989.0, 312.0, None, None]
    assert peak_tflops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_mfu_is_the_share_of_the_peak():
    assert mfu(int(989e12), seconds=2.0, peak_tflops=989.0) == pytest.approx(0.5)


def test_the_description_has_six_lines_with_the_totals():
    work = Work.of(documents=[160] * 102, images=[256] * 102, visual_tokens=64 * 102, supervised=96 * 102)
    lines = describe("align, a row", _model(SMALL), work, trained=["projector"]).split("\n")
    assert len(lines) == 6
    assert lines[0] == "align, a row: 16,320 tokens, 102 images, 9,792 supervised; 127.84 TFLOP (6ND: x1.64)"
    assert lines[1].endswith("learning: projector")
    assert lines[2].split() == ["vision", "22.335", "0.000", "17%", "0.219", "an", "image"]
    assert [line.split()[0] for line in lines[2:]] == ["vision", "projector", "language", "head"]
    assert "an image" not in describe("text", _model(SMALL), Work.of(documents=[5]), trained=[])


def _section(**projector: object) -> dict[str, dict[str, object]]:
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    language = {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    return {
        "vision": {"_target_": "a.b", "image_size": 384, "patch_size": 14, "feature_layer": -2, **sizes},
        "projector": {"_target_": "a.MLP", "in_features": 1152, "out_features": 2048, **projector},
        "language": {"_target_": "a.c", **language, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    }


def test_shapes_are_read_off_a_runs_model_section():
    tower = dataclasses.replace(TOWER, layers=26)
    assert shape_of(_section(visual_grid=12)) == _model(SMALL, fold=1, tower=tower)
    assert shape_of(_section(factor=2, hidden_features=None)) == _model(SMALL, fold=4, tower=tower)
    wide = shape_of(_section(hidden_features=4096, pre_norm=True)).projector
    assert wide == ProjectorShape.mlp(inputs=1152, hidden=4096, outputs=2048, pre_norm=True)


def test_a_model_section_that_cannot_be_read_says_why():
    section = _section()
    del section["vision"]["patch_size"], section["language"]["head_dim"]
    with pytest.raises(UserError, match=r"model\.vision\.patch_size, model\.language\.head_dim not given"):
        shape_of(section)
    with pytest.raises(UserError, match="not an MLP"):
        shape_of(_section(_target_="infimed.models.projector.PerceiverResampler", tokens_per_image=64))


def test_impossible_work_names_every_mistake():
    with pytest.raises(UserError, match=r"documents holds 0.*supervised is 9, expected 0 to 8.*0 images give 3 visual tokens"):
        Work.of(documents=[8, 0], visual_tokens=3, supervised=9)
    with pytest.raises(UserError, match="1 images give 0 visual tokens"):
        Work.of(documents=[8], images=[4])


def test_an_unknown_component_is_refused():
    with pytest.raises(UserError, match=r"visoin.*expected a list of vision, projector, language"):
        flops(TINY, Work(), trained=["visoin"])
    with pytest.raises(UserError, match="expected a list"):
        flops(TINY, Work(), trained="vision")


@pytest.mark.parametrize("name", ["flops", "memory"])
def test_it_is_plain_arithmetic(name):
    tree = ast.parse((Path(module.__file__).parent / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    allowed = {"__future__", "collections.abc", "dataclasses", "typing", "infimed.contracts", "infimed.processing.flops"}
    assert imported <= allowed


@pytest.mark.parametrize("trained", SUBSETS)
def test_prices_add_up_to_the_operations_of_tower_and_blocks(trained):
    documents, images = [5, 40, 3], [16, 4]
    price, work = prices(TINY, trained=trained), Work.of(documents=documents, images=images, visual_tokens=5, supervised=7)
    counted = flops(TINY, work, trained=trained)
    asked = {"token": sum(documents), "pair": sum(n * n for n in documents), "patch": sum(images), "patch_pair": sum(n * n for n in images)}
    assert sum(price[name] * count for name, count in asked.items()) == counted.total - counted.head.total - counted.projector.total
