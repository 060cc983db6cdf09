from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import SiglipVisionConfig, SiglipVisionModel

from infimed.models.fusion import fuse
from infimed.models.generate import generate
from infimed.models.vlm import InfiMed
from tests.conftest import IMAGE_ID, ROOT


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
    assert tower.grid == 27


def test_a_mismatch_of_placeholders_and_features_raises_with_both_numbers(make_model):
    model = make_model()
    ids = torch.full((1, 9), 1)
    ids[0, 2:5] = IMAGE_ID
    with pytest.raises(ValueError, match=r"3 image tokens .* 4 visual features \(1 images of 4 tokens\)"):
        model.embed(ids, torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


def test_features_land_on_their_placeholders_in_order():
    text = torch.zeros(2, 5, 3)
    where = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    visual = torch.arange(12.0).reshape(2, 2, 3) + 1
    fused = fuse(text, visual, where)
    assert (fused[0, 1:3] == visual[0]).all()
    assert (fused[1, 3:] == visual[1]).all()
    assert (fused[~where] == 0).all()


def test_a_frozen_tower_keeps_no_graph_and_a_trained_one_does(make_model):
    model = make_model()
    image = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    assert model.vision(image).requires_grad
    model.vision.requires_grad_(False)
    assert not model.vision(image).requires_grad


def test_parts_that_do_not_fit_are_refused_with_their_widths(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="image_token_id 64 is outside the 64 vocabulary rows"):
        InfiMed(vision=model.vision, projector=model.projector, language=model.language, image_token_id=64)


def test_batched_answers_equal_one_by_one_and_stop(make_model):
    model = make_model()
    for matrix in (p for p in model.parameters() if p.ndim == 2):
        torch.nn.init.normal_(matrix, std=0.5)  # loud enough that a padded position, if it were seen, would change the answer
    prompts = [torch.randint(0, IMAGE_ID, (n,)).tolist() for n in (5, 12, 9)]
    prompts[1][3:7] = [IMAGE_ID] * 4
    images = [torch.randint(0, 256, (n, 3, 28, 28), dtype=torch.uint8) for n in (0, 1, 0)]
    settings = {"max_new_tokens": 8, "stop_ids": (7, 8), "pad_id": 0}
    together = generate(model, prompts, images, **settings)
    alone = [generate(model, [p], [i], **settings)[0] for p, i in zip(prompts, images, strict=True)]
    assert together == alone
    free = generate(model, prompts, images, max_new_tokens=8, stop_ids=(63,), pad_id=0)
    stop = free[0][3]
    stopped = generate(model, prompts[:1], images[:1], max_new_tokens=8, stop_ids=(stop,), pad_id=0)[0]
    assert stopped == free[0][: free[0].index(stop)]


def test_greedy_answers_follow_the_training_forward(make_model):
    """The decoding path (cache, stock attention) and the training path (packed attention) are one model."""
    model = make_model().eval()
    prompt = torch.randint(0, IMAGE_ID, (10,)).tolist()
    prompt[2:6] = [IMAGE_ID] * 4
    image = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    answer = generate(model, [prompt], [image], max_new_tokens=6, stop_ids=(63,), pad_id=0)[0]
    row = torch.tensor([prompt + answer])
    hidden = model.hidden(
        row,
        image,
        position_ids=torch.arange(row.shape[1]).unsqueeze(0),
        cu_seqlens=torch.tensor([0, row.shape[1]], dtype=torch.int32),
        max_seqlen=row.shape[1],
    )
    greedy = model.language.lm_head(hidden)[0].argmax(1).tolist()
    assert greedy[len(prompt) - 1 : -1] == answer
