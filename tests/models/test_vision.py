"""Towers: equal to transformers' own, images that never see each other, frozen ones that keep nothing."""

from __future__ import annotations

from math import isqrt

import pytest
import torch
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel

from infimed.contracts import Images, UserError
from infimed.models.vision import NaflexTower, PackedTower, SiglipTower
from infimed.processing.image import normalise
from tests.conftest import noise

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
GRIDS = ((4, 4), (2, 6), (1, 1), (5, 3))
TOLERANCE = 4e-6  # worst seen 1.2e-6 after the final norm, float32 on a CPU


def naflex(**changes: int | bool) -> NaflexTower:
    return NaflexTower(**{"patch_size": 7, "num_patches": 16, "num_hidden_layers": 3, **SIZES, **changes}).eval()


def siglip(**changes: int | bool) -> SiglipTower:
    return SiglipTower(**{"image_size": 28, "patch_size": 7, "num_hidden_layers": 3, **SIZES, **changes}).eval()


def parts(images: Images) -> list[Images]:
    sizes = [rows * columns for rows, columns in images.grids]
    return [Images.of(patches, [grid]) for patches, grid in zip(images.patches.split(sizes), images.grids, strict=True)]


def test_naflex_equals_transformers_siglip2_on_images_of_any_aspect():
    config = Siglip2VisionConfig(patch_size=7, num_patches=16, num_hidden_layers=3, vision_use_head=False, **SIZES)
    stock, ours = Siglip2VisionModel(config).eval(), naflex()
    ours.load_state_dict(stock.state_dict())  # strict: the same names
    images = noise(*GRIDS)
    longest = max(rows * columns for rows, columns in GRIDS)
    padded, mask = torch.zeros(len(GRIDS), longest, 147), torch.zeros(len(GRIDS), longest, dtype=torch.long)
    for row, part in enumerate(parts(images)):
        padded[row, : len(part.patches)], mask[row, : len(part.patches)] = normalise(part.patches), 1
    expected = stock(pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=torch.tensor(GRIDS)).last_hidden_state
    assert (ours(images) - expected[mask.bool()]).abs().max() < TOLERANCE


def test_siglip_at_its_own_size_equals_transformers_for_many_images_in_one_row():
    config = SiglipVisionConfig(image_size=28, patch_size=7, num_hidden_layers=3, vision_use_head=False, **SIZES)
    stock, ours = SiglipVisionModel(config).eval(), siglip(feature_layer=-1, post_norm=True)
    ours.load_state_dict(stock.state_dict())
    images = noise(*[(4, 4)] * 3)
    pixels = normalise(images.patches).reshape(3, 4, 4, 7, 7, 3).permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 28, 28)
    assert (ours(images) - stock(pixels).last_hidden_state.flatten(0, 1)).abs().max() < TOLERANCE


def test_weights_of_a_square_tower_mean_the_same_in_an_any_aspect_one():
    square, free = siglip(feature_layer=-1, post_norm=True), naflex()
    state = square.state_dict()
    state["embeddings.patch_embedding.weight"] = square.patch_weight()
    free.load_state_dict(state)
    images = noise(*[(4, 4)] * 2)
    assert (square(images) - free(images)).abs().max() < TOLERANCE


@pytest.mark.parametrize("tower", [siglip, naflex])
def test_an_image_in_a_row_is_the_image_alone_in_value_and_gradient(tower):
    ours, images = tower(), noise(*GRIDS)
    together = ours(images)
    alone = torch.cat([ours(part) for part in parts(images)])
    assert (together - alone).abs().max() < TOLERANCE
    weight = ours.encoder.layers[0].self_attn.k_proj.weight
    (found,) = torch.autograd.grad(together.square().sum(), weight)
    (expected,) = torch.autograd.grad(alone.square().sum(), weight)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_changing_one_image_leaves_the_features_of_the_others_untouched():
    ours, images = naflex(), noise(*GRIDS)
    before = ours(images)
    images.patches[16:28] = 255 - images.patches[16:28]  # the second one
    changed = (ours(images) - before).abs().amax(1) > 0
    assert changed.tolist() == [16 <= patch < 28 for patch in range(len(changed))]


@pytest.mark.parametrize("tower", [siglip, naflex])
def test_a_frozen_tower_stays_in_eval_mode_and_saves_nothing_for_a_backward_pass(tower):
    ours, saved = tower(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ours.train()(noise(*GRIDS))
        assert ours.training
        assert len(saved) > 10
        saved.clear()
        ours.requires_grad_(False)
        assert not ours.train().training
        assert not ours(noise(*GRIDS)).requires_grad
    assert saved == []


def test_the_tower_runs_on_the_meta_device_where_no_value_can_be_asked_for():
    with torch.device("meta"):
        ours = naflex().train()
    ours(noise(*GRIDS).to(torch.device("meta"))).sum().backward()
    assert ours.embeddings.position_embedding.weight.grad.shape == (16, 32)


def test_positions_of_the_learned_grid_are_the_table_itself():
    ours: PackedTower = naflex()
    assert torch.equal(ours.positions([(4, 4)]), ours.embeddings.position_embedding.weight)
    assert ours.positions([(4, 4), (2, 6), (2, 6)]).shape == (16 + 24, 32)
    assert ours.table_side == isqrt(16)


def test_a_position_table_that_is_no_square_is_refused():
    with pytest.raises(UserError, match="num_patches=15: expected a square number"):
        naflex(num_patches=15)
