"""Ours against plain transformers at random init: tower, projector, decoder, the whole."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config, SiglipVisionConfig, SiglipVisionModel

from infimed.contracts import Images
from infimed.processing.image import patchify
from tests.conftest import IMAGE_ID

TOLERANCE = 1e-6  # worst seen 0 for tower and whole, float32 on a CPU


def tower_config(layers: int = 3) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        image_size=28,
        patch_size=7,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vision_use_head=False,
    )


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 28, 28), dtype=torch.uint8)


def patches_of(pictures: torch.Tensor) -> Images:
    return Images.of(torch.cat([patchify(picture, 7) for picture in pictures]), [(4, 4)] * len(pictures))


@pytest.mark.parametrize("feature_layer", [-1, -2, -3])
def test_the_tower_reads_the_same_hidden_state_as_transformers(make_model, feature_layer):
    stock = SiglipVisionModel(tower_config()).eval()
    ours = make_model(feature_layer=feature_layer).vision.eval()
    depth = len(ours.encoder.layers)
    state = {k: v for k, v in stock.state_dict().items() if not k.startswith("post_layernorm")}
    ours.load_state_dict({k: v for k, v in state.items() if not (k.startswith("encoder.layers.") and int(k.split(".")[2]) >= depth)})
    image = pixels()
    expected = stock(image.float() / 127.5 - 1, output_hidden_states=True).hidden_states[feature_layer]
    if feature_layer == -1:  # transformers 5 gives the last one after no norm either
        expected = stock.encoder(inputs_embeds=stock.embeddings(image.float() / 127.5 - 1)).last_hidden_state
    assert (ours(patches_of(image)) - expected.flatten(0, 1)).abs().max() < TOLERANCE


def test_the_whole_model_equals_stock_llava_with_a_qwen3_decoder(make_model):
    ours = make_model(visual_grid=4).eval()
    text = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    stock = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower_config(),
            text_config=text,
            image_token_index=IMAGE_ID,
            vision_feature_layer=-2,
            vision_feature_select_strategy="full",
        )
    ).eval()
    stock.model.vision_tower.load_state_dict(ours.vision.state_dict(), strict=False)
    stock.model.multi_modal_projector.load_state_dict(ours.projector.state_dict())
    stock.model.language_model.load_state_dict(ours.language.model.state_dict())
    stock.lm_head.weight = ours.language.lm_head.weight

    ids = torch.randint(0, IMAGE_ID, (1, 24))
    ids[0, 3:19] = IMAGE_ID
    image = pixels(1)
    hidden = ours.hidden(
        ids,
        patches_of(image),
        position_ids=torch.arange(24).unsqueeze(0),
        cu_seqlens=torch.tensor([0, 24], dtype=torch.int32),
        max_seqlen=24,
    )
    expected = stock(input_ids=ids, pixel_values=image.float() / 127.5 - 1, attention_mask=torch.ones_like(ids)).logits
    assert (ours.language.lm_head(hidden) - expected).abs().max() < TOLERANCE
