from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import SiglipVisionConfig, SiglipVisionModel

from infimed.models.fusion import fuse
from infimed.models.vlm import InfiMed
from tests.conftest import IMAGE_ID, ROOT, noise


def published(name: str) -> InfiMed:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["experiment=sft_stage2", f"model={name}"])
    with torch.device("meta"):
        return instantiate(config.model, image_token_id=151_669)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "projector", "language"),
    [("infimed_1_7b", 6_557_696, 1_720_574_976), ("infimed_4b", 9_507_840, 4_022_468_096)],
)
def test_published_sizes_have_the_published_parameter_counts(name, projector, language):
    model = published(name)
    assert count(model.projector) == projector
    assert count(model.language) == language
    assert model.language.lm_head.weight is model.language.model.embed_tokens.weight


def test_the_tower_is_so400m_without_what_is_never_read():
    tower = published("infimed_1_7b").vision
    with torch.device("meta"):
        config = SiglipVisionConfig(
            image_size=384,
            patch_size=14,
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            vision_use_head=False,
        )
        stock = SiglipVisionModel(config)
    assert count(stock) == 412_987_248
    assert count(tower) == count(stock) - count(stock.encoder.layers[-1]) - count(stock.post_layernorm)  # layer -2 is read
    assert tower.table_side == 27


def test_a_mismatch_of_placeholders_and_features_raises_with_both_numbers(make_model):
    model = make_model()
    ids = torch.full((1, 9), 1)
    ids[0, 2:5] = IMAGE_ID
    with pytest.raises(ValueError, match=r"3 image tokens .* 4 visual features \(1 images\)"):
        model.embed(ids, noise((4, 4)))


def test_features_land_on_their_placeholders_in_order():
    text = torch.zeros(2, 5, 3)
    where = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    visual = torch.arange(12.0).reshape(4, 3) + 1
    fused = fuse(text, visual, where, images=2)
    assert (fused[0, 1:3] == visual[:2]).all()
    assert (fused[1, 3:] == visual[2:]).all()
    assert (fused[~where] == 0).all()


def test_a_frozen_tower_keeps_no_graph_and_a_trained_one_does(make_model):
    model = make_model()
    image = noise((4, 4))
    assert model.vision(image).requires_grad
    model.vision.requires_grad_(False)
    assert not model.vision(image).requires_grad


def test_parts_that_do_not_fit_are_refused_with_their_widths(make_model):
    model = make_model()
    parts = {name: getattr(model, name) for name in ("resolution", "vision", "projector", "language")}
    with pytest.raises(ValueError, match="image_token_id 64 is outside the 64 vocabulary rows"):
        InfiMed(**parts, image_token_id=64)
