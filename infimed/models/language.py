"""The language model: Qwen3, or any decoder of transformers that packed attention is exact for, its attention switched to ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from infimed.contracts import UserError
from infimed.models.attention import PACKED

MOVING_ROPE = ("dynamic", "longrope")  # frequencies that depend on the longest position of the row, hence on a sample's neighbours


def qwen3(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    rope_theta: float = 1_000_000.0,
    max_position_embeddings: int = 40_960,
    initializer_range: float = 0.02,
) -> PreTrainedModel:
    """Build Qwen3 with tied embeddings at random init; `initializer_range` is the standard deviation of its matrices.

    Source: arXiv 2505.09388; transformers `models/qwen3/modeling_qwen3.py`.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation(PACKED)
    return model


def causal_lm(*, folder: str | Path, vocab_size: int | None = None) -> PreTrainedModel:
    """Build the decoder that `folder`/config.json describes, at random init and in torch's default type; embeddings tied as it says.

    Nothing is fetched and no code of the folder runs; the weights are loaded afterwards. Under `torch.device("meta")` it costs no memory.

    Args:
        vocab_size: rows of the embedding, at least the configuration's; the surplus are spare rows, for image tokens.

    Raises:
        UserError: no usable config.json, or a decoder that the packed row or the loss would compute wrongly.
    """
    config, model_class = _read_config(Path(folder) / "config.json")
    name = f"{folder} (model_type `{config.model_type}`)"
    if vocab_size is not None:
        if vocab_size < config.vocab_size:
            raise UserError(f"vocab_size {vocab_size} is below the {config.vocab_size} rows of {name}: rows can be added, never cut")
        config.vocab_size = vocab_size
    _refuse(name, _config_problems(config, model_class))
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None  # as long as the model's reach, so it is none; layers would hand it to the kernel all the same
    try:
        model = model_class(config)
    except Exception as error:  # transformers raises whatever a nonsensical number leads to
        raise UserError(f"transformers cannot build {name} from its config.json ({type(error).__name__}: {error})") from error
    _refuse(name, _model_problems(model))
    model.set_attn_implementation(PACKED)
    return model


def materialise(module: nn.Module, *, device: torch.device | str) -> None:
    """Give a module that was built under `torch.device("meta")` memory and the values of its random init; load weights into it next.

    `to_empty` alone leaves noise in what no checkpoint holds (rotary frequencies) and unties the embeddings.

    Raises:
        ValueError: a parameter has memory already (it would be lost), or a module's values cannot be made again.
    """
    filled = [name for name, p in module.named_parameters() if p.device.type != "meta"]
    if filled:
        raise ValueError(f"materialise would wipe {len(filled)} parameters that are not on the meta device, {filled[0]} the first")
    module.to_empty(device=device)
    for name, part in _initialisable(module):
        if isinstance(part, PreTrainedModel):
            part.initialize_weights()
            part.tie_weights()
        elif callable(reset := getattr(part, "reset_parameters", None)):
            reset()
        else:
            raise ValueError(f"{name or type(part).__name__} holds tensors but has no reset_parameters: build it off the meta device")


def _initialisable(module: nn.Module, name: str = "") -> Iterable[tuple[str, nn.Module]]:
    """Yield the outermost transformers models, and outside them every module that holds tensors itself."""
    if isinstance(module, PreTrainedModel):
        yield name, module
        return
    if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
        yield name, module
    for child, part in module.named_children():
        yield from _initialisable(part, f"{name}.{child}".lstrip("."))


def _read_config(file: Path) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """Read a configuration by transformers' own classes and name the class of its causal LM. Raises: UserError."""
    try:
        content = json.loads(file.read_text())
        config_class = CONFIG_MAPPING[content["model_type"]]
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); expected a model folder as published on the hub") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); download it again") from error
    except (KeyError, TypeError) as error:
        given = content.get("model_type") if isinstance(content, dict) else content
        raise UserError(f"{file}: model_type is {given!r}; expected a causal language model that transformers has built in") from error
    try:
        config = config_class.from_dict(content)
        # either may name a repository on the hub whose code transformers would load
        config._attn_implementation = config._experts_implementation = None
        return config, model_class
    except Exception as error:  # each configuration class validates in its own way
        raise UserError(f"{file} is not a valid configuration of `{content['model_type']}` ({error}); download it again") from error


def _refuse(name: str, problems: list[str]) -> None:
    """Raise what stands against a decoder, all of it at once."""
    if problems:
        raise UserError(f"{name} cannot be trained here: {'; '.join(problems)}. Take a plain decoder, such as Qwen3, Llama or SmolLM2")


def _config_problems(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> list[str]:
    """Say what a configuration asks for that packed attention or the loss would silently leave out."""
    problems = []
    if not isinstance(model_class, type) or not model_class._supports_attention_backend:
        problems.append("its attention cannot be exchanged (transformers' attention interface)")
    if config.sub_configs or config.is_encoder_decoder:
        problems.append("it is more than a decoder; give the folder of its language model")
    if getattr(config, "quantization_config", None) is not None:
        problems.append("its weights are quantised; give the folder of the unquantised model")
    window, reach = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0)
    slides = window is not None and window < reach
    kinds = getattr(config, "layer_types", None)
    harmless = {"full_attention"} if slides else {"full_attention", "sliding_attention"}
    if kinds and (other := sorted(set(kinds) - harmless)):
        problems.append(f"it has layers of type {', '.join(other)}; packed attention sees whole samples")
    elif slides and not kinds:
        problems.append(f"its attention slides over {window} of {reach} tokens; packed attention sees whole samples")
    if moving := sorted(_rope_types(config) & set(MOVING_ROPE)):
        problems.append(f"its rotary frequencies ({moving[0]}) change with the longest sample of the row")
    neutral = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}
    for option, value in neutral.items():
        if getattr(config, option, None) not in (None, value):
            problems.append(f"{option} is {getattr(config, option)}; scores and logits are taken as they are")
    return problems


def _model_problems(model: PreTrainedModel) -> list[str]:
    """Say what a built decoder lacks of the interface that the model and the loss use."""
    try:
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
    except NotImplementedError:
        head = table = None
    problems = []
    if not isinstance(getattr(model, "model", None), PreTrainedModel):
        problems.append("it has no `.model`")
    if table is None or not isinstance(head, nn.Linear):
        problems.append("it has no input embedding or no linear output head")
    elif head.bias is not None:
        problems.append("its output head has a bias, which the loss does not add")
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        problems.append("its attention has sinks, which packed attention does not have")
    return problems


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Collect the kinds of rotary embedding, one for all layers or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, Mapping))]
    return {str(one["rope_type"]) for one in each if "rope_type" in one}
