"""Stock transformers classes that compute exactly what a model of ours computes: which one, its files, its weight names.

Source: transformers `models/llava`, `models/lfm2_vl`; weight names as vLLM's `llava.py` and `lfm2_vl.py` read them, which transformers
reads too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from transformers import Lfm2VlConfig, LlavaConfig, PreTrainedConfig

from infimed.contracts import IMAGE_PLACEHOLDER, UserError
from infimed.models.projector import AveragePoolMLP, BlockPoolMLP, UnshuffleMLP, unshuffle_weights
from infimed.models.vision import NaflexTower, SiglipTower
from infimed.models.vlm import InfiMed
from infimed.processing import chat
from infimed.processing.tokenizer import IMAGE_TOKENS, Tokenizer

MLP = (AveragePoolMLP, BlockPoolMLP, UnshuffleMLP)
ANY_ASPECT = "train an any-aspect model (experiment=any_pretrain and its successors), which exports as lfm2_vl"

Weights = dict[str, torch.Tensor]


class Shell(Protocol):
    """One stock architecture."""

    name: str  # transformers' model_type
    architecture: str
    image_markup: str  # what the chat template writes for an image; the stock processor turns it into the image's tokens

    def obstacles(self, model: InfiMed) -> list[str]:
        """Say why the stock class would compute something else, each with the way out; nothing when it is exact."""
        ...

    def config(self, model: InfiMed) -> PreTrainedConfig:
        """Describe the stock model."""
        ...

    def weights(self, model: InfiMed) -> Weights:
        """Name the weights as the stock class does; views of the model's own wherever nothing is converted."""
        ...

    def preprocessor(self, model: InfiMed) -> dict[str, object]:
        """Describe the stock image processor: `preprocessor_config.json`."""
        ...

    def processor(self, model: InfiMed) -> dict[str, object]:
        """Describe the stock processor around it: `processor_config.json`."""
        ...


class Llava:
    """Square images, every patch a visual token, features before the tower's final norm."""

    name = "llava"
    architecture = "LlavaForConditionalGeneration"
    image_markup = f"{IMAGE_TOKENS[1]}{IMAGE_PLACEHOLDER}{IMAGE_TOKENS[2]}"

    def obstacles(self, model: InfiMed) -> list[str]:
        """See `Shell`."""
        problems, projector, resolution = _projector_obstacles(model), model.projector, model.resolution
        if resolution.image_size is None or not isinstance(model.vision, SiglipTower):
            problems.append(f"llava reads SigLIP with square images, this model has {_tower(model)}: shell=lfm2_vl may fit")
        elif isinstance(projector, MLP):
            rows, columns = resolution.largest
            if (tokens := resolution.tokens((rows, columns))) != rows * columns:
                problems.append(_pooled(rows, tokens))
            if (width := projector.linear_1.out_features) != projector.out_features:
                problems.append(f"llava's projector is {projector.out_features} wide inside, this one {width}: {ANY_ASPECT}")
            if getattr(projector, "layer_norm", None) is not None:
                problems.append(f"llava's projector has no norm, this one begins with one (pre_norm): {ANY_ASPECT}")
        if isinstance(model.vision, SiglipTower) and model.vision.post_layernorm is not None:
            problems.append("llava reads the tower before its final norm, this model after it: train with model.vision.post_norm=false")
        return problems

    def config(self, model: InfiMed) -> PreTrainedConfig:
        """See `Shell`. The tower has only the blocks that are read, so its last hidden state before the norm is layer -1."""
        return LlavaConfig(
            architectures=[self.architecture],
            vision_config=_plain(model.vision.config) | {"image_size": model.resolution.image_size},
            text_config=_text_config(model),
            image_token_index=model.image_token_id,
            image_seq_length=model.resolution.tokens(model.resolution.largest),
            projector_hidden_act="gelu",
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            tie_word_embeddings=_is_tied(model),
        )

    def weights(self, model: InfiMed) -> Weights:
        """See `Shell`. The stock tower has a final norm that nothing reads: it is written as the identity."""
        tower = _tower_weights(model) | {
            "embeddings.position_embedding.weight": model.vision.positions((model.resolution.largest,)).detach(),
            "post_layernorm.weight": torch.ones(model.vision.hidden_size),
            "post_layernorm.bias": torch.zeros(model.vision.hidden_size),
        }
        return (
            _prefixed("vision_tower.vision_model.", tower)
            | _prefixed("multi_modal_projector.", model.projector.state_dict())
            | _prefixed("language_model.", _language_weights(model))
        )

    def preprocessor(self, model: InfiMed) -> dict[str, object]:
        """See `Shell`."""
        square = {"height": model.resolution.image_size, "width": model.resolution.image_size}
        return {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "LlavaProcessor",
            "size": square,
            "crop_size": square,  # nothing is cropped; transformers' LlavaProcessor counts an image's tokens by it
            "do_center_crop": False,
            "do_convert_rgb": True,
            "resample": 3,  # bicubic
            **_SCALING,
        }

    def processor(self, model: InfiMed) -> dict[str, object]:
        """See `Shell`."""
        return {
            "processor_class": "LlavaProcessor",
            "patch_size": model.resolution.patch_size,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
            "image_token": IMAGE_PLACEHOLDER,
        }


class Lfm2Vl:
    """Images of any aspect, blocks of patches a visual token, features after the tower's final norm."""

    name = "lfm2_vl"
    architecture = "Lfm2VlForConditionalGeneration"
    image_markup = IMAGE_PLACEHOLDER  # its processors, here and in vLLM and llama.cpp, add start and end themselves

    def obstacles(self, model: InfiMed) -> list[str]:
        """See `Shell`."""
        problems = _projector_obstacles(model)
        if not isinstance(model.vision, NaflexTower):
            problems.append(
                f"lfm2_vl reads SigLIP2-NaFlex after its final norm, this model has {_tower(model)}: shell=llava may fit; or {ANY_ASPECT}"
            )
        elif model.vision.post_layernorm is None:
            problems.append("lfm2_vl reads the tower after its final norm, this model before it: train with model.vision.post_norm=true")
        if model.resolution.image_size is not None:
            problems.append(
                "lfm2_vl's processor keeps the shape of a picture, this model squeezes it to a square: "
                "train the next stage with resolution.image_size=null"
            )
        return problems

    def config(self, model: InfiMed) -> PreTrainedConfig:
        """See `Shell`. `layer_types` at the top makes vLLM see that no layer is LFM2's convolution."""
        return Lfm2VlConfig(
            architectures=[self.architecture],
            vision_config=_plain(model.vision.config),
            text_config=_text_config(model),
            image_token_id=model.image_token_id,
            projector_hidden_act="gelu",
            projector_hidden_size=model.projector.linear_1.out_features,
            projector_bias=True,
            projector_use_layernorm=getattr(model.projector, "layer_norm", None) is not None,
            downsample_factor=model.resolution.pool,
            tie_word_embeddings=_is_tied(model),
            layer_types=["full_attention"] * model.language.config.num_hidden_layers,
        )

    def weights(self, model: InfiMed) -> Weights:
        """See `Shell`. A mean over a block becomes a matrix over the block's patches side by side."""
        projector = model.projector.state_dict()
        if isinstance(model.projector, BlockPoolMLP):
            projector = unshuffle_weights(projector, pool=model.projector.pool)
        language = {
            key if key.startswith("lm_head.") else f"model.language_model.{key.removeprefix('model.')}": value
            for key, value in _language_weights(model).items()
        }
        return (
            _prefixed("model.vision_tower.vision_model.", _tower_weights(model))
            | _prefixed("model.multi_modal_projector.", projector)
            | language
        )

    def preprocessor(self, model: InfiMed) -> dict[str, object]:
        """See `Shell`. One tile is said twice: transformers reads `do_image_splitting`, vLLM reads the numbers of tiles."""
        return {
            "image_processor_type": "Lfm2VlImageProcessor",
            "processor_class": "Lfm2VlProcessor",
            "encoder_patch_size": model.resolution.patch_size,
            "downsample_factor": model.resolution.pool,
            "min_image_tokens": model.resolution.min_visual_tokens,
            "max_image_tokens": model.resolution.max_visual_tokens,
            "do_image_splitting": False,
            "min_tiles": 1,
            "max_tiles": 1,
            "use_thumbnail": False,
            "do_pad": True,
            "resample": 2,  # bilinear
            **_SCALING,
        }

    def processor(self, model: InfiMed) -> dict[str, object]:
        """See `Shell`."""
        return {"processor_class": "Lfm2VlProcessor"}


SHELLS: Mapping[str, Shell] = {shell.name: shell for shell in (Llava(), Lfm2Vl())}

_SCALING = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def choose(model: InfiMed, *, shell: str = "auto") -> Shell:
    """Pick the stock class for a model; auto: llava for square images, lfm2_vl for any aspect.

    Raises:
        UserError: no such shell, or it would compute something else: every reason, with the way out.
    """
    if shell not in ("auto", *SHELLS):
        raise UserError(f"shell={shell}: expected auto, {' or '.join(SHELLS)}")
    name = shell if shell != "auto" else "lfm2_vl" if model.resolution.image_size is None else "llava"
    if problems := SHELLS[name].obstacles(model):
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise UserError(f"this checkpoint cannot be written as {name} and stay the same model:\n{listed}")
    return SHELLS[name]


def chat_template(shell: Shell) -> str:
    """Return the Jinja template that renders what chat.py renders."""
    body = Path(chat.__file__).with_name("chat_template.jinja").read_text()
    return f"{{%- set image_markup = '{shell.image_markup}' -%}}\n{body}"


def tokenizer_config(tokenizer: Tokenizer, model: InfiMed) -> dict[str, object]:
    """Describe the tokenizer: `tokenizer_config.json` beside a `tokenizer.json` that is read as it is."""
    names = ("image_token", "image_start_token", "image_end_token", "image_thumbnail_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.decode([tokenizer.im_end_id], skip_special=False),
        "pad_token": tokenizer.decode([tokenizer.pad_id], skip_special=False),
        "extra_special_tokens": dict(zip(names, IMAGE_TOKENS, strict=True)),
        "model_max_length": model.language.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, object]:
    """Say where an answer ends, and that it is greedy: `generation_config.json`."""
    return {"eos_token_id": [tokenizer.im_end_id, tokenizer.pad_id], "pad_token_id": tokenizer.pad_id, "do_sample": False}


def _projector_obstacles(model: InfiMed) -> list[str]:
    if isinstance(model.projector, MLP):
        return []
    return [
        f"no stock class has a {type(model.projector).__name__} between a SigLIP tower and a language model: "
        f"train with AveragePoolMLP at the full grid, BlockPoolMLP or UnshuffleMLP"
    ]


def _pooled(side: int, tokens: int) -> str:
    """Explain what a pooled square model lacks."""
    grid = round(tokens**0.5)
    windows = "blocks of patches" if side % grid == 0 else f"windows that overlap, since {grid} does not divide {side},"
    lfm2 = "lfm2_vl pools blocks, but keeps a picture's shape and reads the tower after its final norm"
    return (
        f"the projector averages {side} x {side} patches over {windows} to {grid} x {grid} tokens; llava has no pooling ({lfm2}): "
        f"train the next stage at resolution.visual_grid={side}, the same weights (init_from) go on; or {ANY_ASPECT}"
    )


def _tower(model: InfiMed) -> str:
    images = "images of any aspect" if model.resolution.image_size is None else "square images"
    return f"{type(model.vision).__name__} and {images}"


def _plain(config: PreTrainedConfig) -> dict[str, object]:
    """Turn a part's configuration into plain values, without the place on disk that it was read from."""
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def _text_config(model: InfiMed) -> dict[str, object]:
    """Name the decoder's own class too: vLLM and llama.cpp build the text half by it."""
    return _plain(model.language.config) | {"architectures": [type(model.language).__name__]}


def _is_tied(model: InfiMed) -> bool:
    return model.language.config.tie_word_embeddings


def _tower_weights(model: InfiMed) -> Weights:
    return dict(model.vision.state_dict())


def _language_weights(model: InfiMed) -> Weights:
    """Return the decoder's weights; a tied head is not written twice."""
    return {key: value for key, value in model.language.state_dict().items() if not (_is_tied(model) and key.startswith("lm_head."))}


def _prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> Weights:
    return {prefix + key: value for key, value in state.items()}
