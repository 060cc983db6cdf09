"""Published weights on disk: which folder a name means, which files it holds, and whether its config.json describes the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from huggingface_hub import constants, snapshot_download
from transformers import CONFIG_MAPPING, PreTrainedConfig

from infimed.contracts import UserError
from infimed.processing.tokenizer import Tokenizer

OWNERS = {"vision": "google", "language": "Qwen"}
"""The parts that have published weights, and whose they are when a missing folder does not say it."""

INDEX = "model.safetensors.index.json"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TOWERS = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
# compared by name: what tensors cannot show (heads, activation, rotary base), and what they show only as wrong shapes
_BOTH = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
_DECODER = ("model_type", "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "rms_norm_eps", "rope_theta")
DIMENSIONS = {"vision": (*_BOTH, "patch_size", "image_size", "num_patches", "layer_norm_eps"), "language": (*_BOTH, *_DECODER)}


def find_folder(given: str | Path, *, part: str) -> Path:
    """Return the folder that `weights.PART` means: one on this disk, or of the hub cache when a hub name such as Qwen/Qwen3-1.7B is given.

    Nothing is fetched unless the environment says HF_HUB_OFFLINE=0.

    Raises:
        UserError: it holds no safetensors weights, with the command that gets them.
    """
    folder, name = Path(given), Path(given).name
    if not is_hub_name(given):
        lacks, fetch = "holds no safetensors weights", f"hf download {OWNERS[part]}/{name} --local-dir {folder}"
    else:
        fetch = f"hf download {given} --local-dir weights/{name}"
        try:
            folder = Path(snapshot_download(str(given), local_files_only=not _online(), allow_patterns=["*.safetensors", "*.json"]))
            lacks = f"({folder}) holds no safetensors weights"
        except Exception as error:  # the library also raises what its HTTP client does
            reason = str(error).partition("\n")[0] if _online() else f"looked in {constants.HF_HUB_CACHE}"
            lacks = f"is no folder here and not complete in the hub cache ({reason})"
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"weights.{part}={given} {lacks}; get them with: {fetch}")
    return folder


def is_hub_name(given: str | Path) -> bool:
    """Say whether OWNER/NAME is meant: not a path below a folder that is here, nor below `weights`, where the recipes keep theirs."""
    owner = Path(given).parent
    return HUB_NAME.fullmatch(str(given)) is not None and not owner.exists() and str(owner) != "weights"


def _online() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("0", "false", "no", "off")


def weight_files(folder: Path) -> list[Path]:
    """List `model.safetensors`, or the files that the index names.

    Raises:
        UserError: naming every file that is not there; a name that leaves the folder counts as not there.
    """
    index = folder / INDEX
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index ({type(error).__name__}: {error}); download it again") from error
    if absent:
        raise UserError(f"{folder} lacks {', '.join(absent)}: expected a hub folder with safetensors weights; download it again")
    return [folder / name for name in names]


def dimension_problems(folder: Path, *, part: str, model: Mapping[str, object]) -> list[str]:
    """Compare config.json with a model's dimensions, before any tensor is read: at most one problem, which lists every difference.

    A folder without config.json is left to its tensors.

    Args:
        model: dimensions by their names in transformers' configurations; those that are not given are not compared.
    """
    file = folder / "config.json"
    if not file.is_file():
        return []
    try:
        theirs = _dimensions(_read_config(file, part), part)
    except UserError as error:
        return [str(error)]
    lines = []
    for name in DIMENSIONS[part]:
        if name in model and name in theirs and model[name] != theirs[name]:
            lines.append(f"\n  {name}: the folder says {theirs[name]}, the model has {model[name]}")
    fix = f"choose the `model=` of this folder (or set model.{part}.*), or the folder of this model"
    return [f"weights.{part}: {folder} holds a model of other dimensions; {fix}{''.join(lines)}"] if lines else []


def dimensions_of(config: PreTrainedConfig, *, part: str) -> dict[str, object]:
    """Read from a configuration what `dimension_problems` compares."""
    return _dimensions(config, part)


def vocabulary_problems(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Compare a tokenizer with the one that lies beside the weights: every token of theirs must be the same row, more tokens are fine."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return []
    try:
        theirs = tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception on a malformed file
        return [f"weights.language: {file} is not a tokenizer.json ({error}); download it again"]
    moved = [token for token, row in theirs.items() if _row_of(tokenizer, token) != row]
    if not moved:
        return []
    first = min(moved, key=theirs.get)
    return [
        f"tokenizer: {len(moved)} of {len(theirs)} tokens are not the rows that the weights in {folder} were trained with, the first is "
        f"{first!r} (row {theirs[first]} there, {_row_of(tokenizer, first)} here); expected tokenizer={folder}"
    ]


def _row_of(tokenizer: Tokenizer, token: str) -> int | None:
    try:
        return tokenizer.id_of(token)
    except KeyError:
        return None


def _read_config(file: Path, part: str) -> PreTrainedConfig:
    """Read config.json by transformers' own class, which knows what published files leave out."""
    try:
        content = json.loads(file.read_text())
        config = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    except KeyError as error:
        raise UserError(
            f"weights.{part}: {file} has no model_type that transformers knows ({error}); expected a published model"
        ) from error
    except Exception as error:  # not JSON, or refused by the class, each in its own way
        raise UserError(f"weights.{part}: {file} is not a model's configuration ({error}); download it again") from error
    if part == "vision" and config.model_type not in TOWERS:
        raise UserError(f"weights.vision: {file.parent} is a `{config.model_type}`; expected one of {', '.join(TOWERS)}")
    return getattr(config, "vision_config", config) if part == "vision" else config


def _dimensions(config: PreTrainedConfig, part: str) -> dict[str, object]:
    found = {name: getattr(config, name) for name in DIMENSIONS[part] if getattr(config, name, None) is not None}
    if part == "vision" and "num_patches" not in found:
        found["num_patches"] = (config.image_size // config.patch_size) ** 2
    rope = getattr(config, "rope_parameters", None) or {}
    return found | ({"rope_theta": float(rope["rope_theta"])} if "rope_theta" in rope else {})
