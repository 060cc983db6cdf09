from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from transformers import LlavaConfig
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverAttention
from transformers.models.lfm2_vl.configuration_lfm2_vl import Lfm2VlConfig
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlMultiModalProjector
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.regnet.configuration_regnet import RegNetConfig
from transformers.models.regnet.modeling_regnet import RegNetYLayer

from infimed.contracts import UserError
from infimed.models.projector import (
    AveragePoolMLP,
    BlockPoolMLP,
    CAbstractor,
    PerceiverResampler,
    Projector,
    UnshuffleMLP,
    unshuffle_weights,
)

WIDTHS = {"in_features": 16, "out_features": 24}
CHOICES: dict[str, Callable[[], Projector]] = {
    "average": lambda: AveragePoolMLP(**WIDTHS, visual_grid=3),
    "average_identity": lambda: AveragePoolMLP(**WIDTHS, visual_grid=4),
    "block": lambda: BlockPoolMLP(**WIDTHS, pool=2, hidden_features=20),
    "unshuffle": lambda: UnshuffleMLP(**WIDTHS, factor=2),
    "unshuffle_norm": lambda: UnshuffleMLP(**WIDTHS, factor=2, hidden_features=20, pre_norm=True),
    "perceiver": lambda: PerceiverResampler(**WIDTHS, tokens_per_image=5, depth=2, heads=4),
    "abstractor": lambda: CAbstractor(**WIDTHS, visual_grid=3, depth=2, hidden_features=12),
}
MIXED = [(4, 4), (4, 4), (6, 4), (4, 8), (4, 4), (8, 6)]
TOLERANCE = 1e-6  # worst seen 2.4e-7 (attention against Idefics2), 1.2e-7 elsewhere, values of order 1, float32 on a CPU

every_choice = pytest.mark.parametrize("name", CHOICES)


def patches(grids: list[tuple[int, int]], width: int = 16) -> torch.Tensor:
    return torch.randn(sum(r * c for r, c in grids), width)


def split(projector: Projector, visual: torch.Tensor, grids: list[tuple[int, int]]) -> list[torch.Tensor]:
    return list(visual.split([projector.tokens(grid) for grid in grids]))


@every_choice
def test_the_tokens_of_a_grid_are_the_rows_that_come_back(name):
    projector = CHOICES[name]()
    for grids in ([(4, 4)], [(6, 4)], [(4, 10)], [(12, 8)] * 2, MIXED, []):
        visual = projector(patches(grids), grids)
        assert visual.shape == (sum(map(projector.tokens, grids)), 24)
    assert (projector.in_features, projector.out_features) == (16, 24)


@every_choice
def test_an_image_alone_equals_itself_among_others(name):
    projector = CHOICES[name]()
    images = [patches([grid]) for grid in MIXED]
    together = split(projector, projector(torch.cat(images), MIXED), MIXED)
    for image, grid, seen in zip(images, MIXED, together, strict=True):
        assert (projector(image, [grid]) - seen).abs().max() < TOLERANCE


@every_choice
def test_a_changed_image_leaves_its_neighbours_bit_identical(name):
    projector = CHOICES[name]()
    features = patches(MIXED)
    before = split(projector, projector(features, MIXED), MIXED)
    features[16:32] += 1.0  # the second image: one batch with the first
    after = split(projector, projector(features, MIXED), MIXED)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True, True, True]


@every_choice
def test_gradients_reach_every_parameter_and_every_patch(name):
    projector, features = CHOICES[name](), patches(MIXED).requires_grad_()
    visual = projector(features, MIXED)
    (visual * torch.randn_like(visual)).sum().backward()
    for key, parameter in (*projector.named_parameters(), ("features", features)):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().amax() > 0, key
    assert (features.grad.abs().amax(dim=1) > 0).all()


@every_choice
def test_every_choice_runs_on_meta_and_is_filled_by_reset_parameters(name):
    with torch.device("meta"):
        projector = CHOICES[name]()
        visual = projector(patches(MIXED), MIXED)
        visual.sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in projector.parameters())
    projector.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.fill_(torch.nan)
    for module in projector.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert projector(patches(MIXED), MIXED).isfinite().all()


@every_choice
def test_mixed_precision_reaches_every_parameter(name):
    projector = CHOICES[name]()
    with torch.autocast("cpu", torch.bfloat16):
        visual = projector(patches(MIXED).bfloat16(), MIXED)
    visual.sum().backward()
    assert visual.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.parametrize(("name", "side"), [("average", 1), ("block", 2), ("unshuffle", 2), ("perceiver", 1), ("abstractor", 1)])
def test_the_smallest_image_goes_through(name, side):
    projector = CHOICES[name]()
    visual = projector(patches([(side, side)]), [(side, side)])
    assert visual.shape == (projector.tokens((side, side)), 24) and visual.isfinite().all()


def test_neighbours_of_equal_grid_are_one_batch_and_the_full_grid_is_not_pooled(monkeypatch):
    shapes = []
    pool = F.adaptive_avg_pool2d
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, size: shapes.append(tuple(x.shape)) or pool(x, size))
    grids = [(4, 4), (4, 4), (4, 4), (6, 4), (3, 3), (4, 4)]
    CHOICES["average"]()(patches(grids), grids)
    assert shapes == [(3, 16, 4, 4), (1, 16, 6, 4), (1, 16, 4, 4)]


@pytest.mark.parametrize(("width", "parameters"), [(2048, 6_557_696), (2560, 9_507_840)])
def test_the_projector_has_the_published_number_of_parameters(width, parameters):
    with torch.device("meta"):
        average = AveragePoolMLP(in_features=1152, out_features=width, visual_grid=27)
        block = BlockPoolMLP(in_features=1152, out_features=width, pool=2)
    assert sum(p.numel() for p in average.parameters()) == sum(p.numel() for p in block.parameters()) == parameters


def test_pooling_to_the_full_grid_is_stock_llavas_projector():
    stock = LlavaMultiModalProjector(
        LlavaConfig(
            vision_config={"model_type": "siglip_vision_model", "hidden_size": 16},
            text_config={"model_type": "qwen3", "hidden_size": 24},
            projector_hidden_act="gelu",
        )
    )
    ours = CHOICES["average_identity"]()
    ours.load_state_dict(stock.state_dict())
    image = patches([(4, 4)])
    assert torch.equal(ours(image, [(4, 4)]), stock(image))


@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (3, 8)])
def test_a_grid_that_does_not_divide_pools_like_torch(grid):
    projector, image = CHOICES["average"](), patches([grid])
    pooled = F.adaptive_avg_pool2d(image.T.reshape(1, 16, *grid), 3).flatten(2)[0].T
    expected = projector.linear_2(F.gelu(projector.linear_1(pooled)))
    assert (projector(image, [grid]) - expected).abs().max() < TOLERANCE


def test_weights_carry_over_between_grids_pools_and_both_ways_of_pooling():
    source = AveragePoolMLP(**WIDTHS, visual_grid=2)
    fine, block = AveragePoolMLP(**WIDTHS, visual_grid=4), BlockPoolMLP(**WIDTHS, pool=2)
    for target in (fine, block):
        target.load_state_dict(source.state_dict())
    image = patches([(4, 4)])
    assert (source(image, [(4, 4)]) - block(image, [(4, 4)])).abs().max() < TOLERANCE
    means = torch.stack([image.view(4, 4, 16)[r : r + 2, c : c + 2].mean((0, 1)) for r in (0, 2) for c in (0, 2)])
    assert (block(image, [(4, 4)]) - fine(means.repeat(4, 1), [(4, 4)])[:4]).abs().max() < TOLERANCE
    whole = BlockPoolMLP(**WIDTHS, pool=4)
    whole.load_state_dict(source.state_dict())
    assert (whole(image, [(4, 4)]) - source(image.mean(0).expand(16, 16), [(4, 4)])[:1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_unshuffling_equals_stock_lfm2_vl_on_rectangular_grids(factor, pre_norm):
    stock = Lfm2VlMultiModalProjector(
        Lfm2VlConfig(
            vision_config={"model_type": "siglip2_vision_model", "hidden_size": 16},
            text_config={"model_type": "qwen3", "hidden_size": 24},
            downsample_factor=factor,
            projector_hidden_size=20,
            projector_hidden_act="gelu",
            projector_use_layernorm=pre_norm,
        )
    )
    ours = UnshuffleMLP(**WIDTHS, factor=factor, hidden_features=20, pre_norm=pre_norm)
    ours.load_state_dict(stock.state_dict())
    grids = [(6, 12), (6, 12), (12, 6)]
    images = [patches([grid]) for grid in grids]
    expected = torch.cat([stock(image.view(1, *grid, 16)).reshape(-1, 24) for image, grid in zip(images, grids, strict=True)])
    assert (ours(torch.cat(images), grids) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_block_pooling_is_exported_exactly_as_unshuffling(pool):
    block = BlockPoolMLP(**WIDTHS, pool=pool, hidden_features=20)
    unshuffle = UnshuffleMLP(**WIDTHS, factor=pool, hidden_features=20)
    unshuffle.load_state_dict(unshuffle_weights(block.state_dict(), pool=pool))
    grids = [(6, 12), (12, 6)]
    features = patches(grids)
    assert (block(features, grids) - unshuffle(features, grids)).abs().max() < TOLERANCE


def test_the_resampler_attends_as_idefics2_does():
    layer = CHOICES["perceiver"]().layers[0]
    stock = Idefics2PerceiverAttention(
        Idefics2PerceiverConfig(
            hidden_size=16, resampler_n_heads=4, resampler_head_dim=4, num_key_value_heads=4, attn_implementation="eager"
        ),
        layer_idx=0,
    )
    stock.load_state_dict({key: value for key, value in layer.state_dict().items() if "_proj." in key})
    queries, features = torch.randn(2, 5, 16), torch.randn(2, 12, 16)
    read = queries + stock(layer.query_norm(queries), layer.feature_norm(features))[0]
    assert (layer(queries, features) - (read + layer.mlp(layer.mlp_norm(read)))).abs().max() < TOLERANCE


def test_the_resampler_starts_with_queries_that_differ():
    visual = CHOICES["perceiver"]()(patches([(4, 4)]), [(4, 4)])
    assert torch.cdist(visual, visual).fill_diagonal_(1.0).min() > 1e-2


class ChannelNorm(torch.nn.LayerNorm):
    def forward(self, x_NCHW):
        return super().forward(x_NCHW.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("width_in", [12, 16])
def test_the_abstractors_block_is_stock_regnets_with_layer_norms_and_silu(width_in):
    first, second = CHOICES["abstractor"]().before
    ours = first if width_in == 16 else second
    stock = RegNetYLayer(RegNetConfig(hidden_act="silu", groups_width=1), width_in, 12)
    stock.layer[2].attention[1] = torch.nn.SiLU()
    norms = [module for module in stock.modules() if hasattr(module, "normalization")]
    for module in norms:
        module.normalization = ChannelNorm(12)
    names = {
        "layer.0.convolution": "reduce",
        "layer.0.normalization": "reduce_norm",
        "layer.1.convolution": "conv",
        "layer.1.normalization": "conv_norm",
        "layer.2.attention.0": "gate.0",
        "layer.2.attention.2": "gate.2",
        "layer.3.convolution": "expand",
        "layer.3.normalization": "expand_norm",
        "shortcut.convolution": "shortcut.0",
        "shortcut.normalization": "shortcut.1",
    }
    state = ours.state_dict()
    keys = {key: re.sub(r"^(.*)\.(\w+)$", lambda m: f"{names[m[1]]}.{m[2]}", key) for key in stock.state_dict()}
    assert sorted(keys.values()) == sorted(state)
    stock.load_state_dict({key: state[keys[key]].reshape(value.shape) for key, value in stock.state_dict().items()})
    image = torch.randn(2, 6, 5, width_in)
    assert (ours(image) - stock(image.movedim(-1, 1)).movedim(1, -1)).abs().max() < TOLERANCE


def test_the_abstractor_knows_where_inside_a_window_a_patch_lies_and_pooling_does_not():
    abstractor, average = CAbstractor(**WIDTHS, visual_grid=2, depth=1, hidden_features=12), AveragePoolMLP(**WIDTHS, visual_grid=2)
    image = patches([(4, 4)])
    swapped = image.clone()
    swapped[[0, 1]] = image[[1, 0]]
    assert (average(image, [(4, 4)]) - average(swapped, [(4, 4)])).abs().max() < TOLERANCE
    assert (abstractor(image, [(4, 4)]) - abstractor(swapped, [(4, 4)])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("build", "grid", "message"),
    [
        (
            lambda: BlockPoolMLP(**WIDTHS, pool=2),
            (27, 27),
            "a 27 x 27 grid does not divide by pool 2: use pool 1, 3, 9 or 27 or the adaptive AveragePoolMLP",
        ),
        (
            lambda: BlockPoolMLP(**WIDTHS, pool=2),
            (7, 4),
            "a 7 x 4 grid does not divide by pool 2: use pool 1 or the adaptive AveragePoolMLP",
        ),
        (
            lambda: UnshuffleMLP(**WIDTHS, factor=4),
            (12, 6),
            "a 12 x 6 grid does not divide by factor 4: use factor 1, 2, 3 or 6 or the adaptive AveragePoolMLP",
        ),
    ],
)
def test_a_grid_that_does_not_fit_names_the_choices_that_do(build, grid, message):
    projector = build()
    with pytest.raises(UserError, match=re.escape(message)):
        projector.tokens(grid)
    with pytest.raises(UserError, match=re.escape(message)):
        projector(patches([(12, 12), grid]), [(12, 12), grid])


def test_grids_that_do_not_account_for_the_patches_are_refused():
    for name, build in CHOICES.items():
        with pytest.raises(ValueError, match=r"31 patch features, but the 2 grids hold 32 patches"):
            build()(patches([(4, 4), (4, 4)])[1:], [(4, 4), (4, 4)]), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AveragePoolMLP(in_features=0, out_features=-1, visual_grid=3), "in_features=0, out_features=-1: expected a whole number"),
        (lambda: AveragePoolMLP(**WIDTHS, visual_grid=0), "visual_grid=0: expected"),
        (lambda: BlockPoolMLP(**WIDTHS, pool=0), "pool=0: expected"),
        (lambda: UnshuffleMLP(**WIDTHS, factor=-2), "factor=-2: expected"),
        (lambda: UnshuffleMLP(**WIDTHS, factor=2, hidden_features=0), "hidden_features=0: expected"),
        (lambda: PerceiverResampler(**WIDTHS, tokens_per_image=0, depth=0), "tokens_per_image=0, depth=0: expected"),
        (
            lambda: PerceiverResampler(**WIDTHS, tokens_per_image=4, heads=7),
            "heads=7 does not divide in_features=16: the nearest that does is heads=8",
        ),
        (lambda: CAbstractor(**WIDTHS, visual_grid=3, depth=0), "depth=0: expected"),
    ],
)
def test_an_impossible_option_is_named(build, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build()
