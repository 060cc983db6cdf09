"""Load weights strictly: every missing, unexpected or mis-shaped key is reported, all at once. Never runs code from a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from infimed.contracts import UserError
from infimed.models.vlm import InfiMed

MODULE_PREFIX = "model."  # the LightningModule holds the model under this name
UNUSED_IN_TOWER = ("text_model.", "logit_scale", "logit_bias", "vision_model.head.", "vision_model.post_layernorm.")


def read_checkpoint(file: Path) -> dict:
    """Read one of our checkpoints: plain tensors and plain values only (`weights_only=True`).

    Raises:
        UserError: not a checkpoint of ours.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise UserError(f"{file} is not a readable checkpoint ({type(error).__name__}): it may be truncated; take an older one") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "infimed" not in checkpoint:
        raise UserError(f"{file} was not written by this project: expected the weights and the configuration that it was trained with")
    return checkpoint


def find_checkpoint(path: str | Path) -> Path:
    """Resolve what a user types: a `.ckpt` file, the same without its ending, or a run folder that holds `last.ckpt`."""
    path = Path(path)
    for candidate in (path, Path(f"{path}.ckpt"), path / "last.ckpt", path / "checkpoints" / "last.ckpt"):
        if candidate.is_file():
            return candidate
    found = sorted(path.glob("**/last.ckpt")) if path.is_dir() else sorted(Path("logs").glob("**/last.ckpt"))
    hint = f"; these exist: {', '.join(map(str, found[-5:]))}" if found else "; train one first: make demo"
    raise UserError(f"no checkpoint at {path}: expected a .ckpt file or a run folder that holds last.ckpt{hint}")


def load_state(module: nn.Module, state: Mapping[str, torch.Tensor], *, origin: str) -> None:
    """Copy tensors into a module, all of them or none.

    Raises:
        UserError: naming every key that is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    problems = [f"missing: {key} {list(own[key].shape)}" for key in own.keys() - state.keys()]
    problems += [f"unexpected: {key} {list(state[key].shape)}" for key in state.keys() - own.keys()]
    problems += [
        f"shape: {key} is {list(state[key].shape)}, the model has {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:12])
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(
            f"{origin} does not fit this model ({len(problems)} keys); choose the `model=` that it was made with\n  {shown}{more}"
        )
    module.load_state_dict(dict(state))


def load_checkpoint(model: InfiMed, path: str | Path) -> None:
    """Take the weights of one of our checkpoints (`init_from`): of the weights only, not of optimizer or position."""
    file = find_checkpoint(path)
    load_state_of(model, read_checkpoint(file), origin=str(file))


def load_state_of(model: InfiMed, checkpoint: Mapping, *, origin: str) -> None:
    """Take the weights out of a checkpoint that is already read."""
    state = {key.removeprefix(MODULE_PREFIX): value for key, value in checkpoint.get("state_dict", {}).items()}
    load_state(model, state, origin=origin)


def load_hub_folders(model: InfiMed, *, vision: str | Path, language: str | Path) -> None:
    """Take tower and decoder from folders as published on the hub (safetensors, sharded or not); the projector stays at random init."""
    depth = len(model.vision.encoder.layers)

    def tower_key(key: str) -> str | None:
        if key.startswith(UNUSED_IN_TOWER):
            return None
        key = key.removeprefix("vision_model.")
        unread = key.startswith("encoder.layers.") and int(key.split(".")[2]) >= depth  # blocks after the feature layer
        return None if unread else key

    load_state(model.vision, _read_safetensors(Path(vision), tower_key), origin=str(vision))
    state = _read_safetensors(Path(language), lambda key: key)
    if model.language.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    load_state(model.language, state, origin=str(language))


def _read_safetensors(folder: Path, rename: Callable[[str], str | None]) -> dict[str, torch.Tensor]:
    """Read `model.safetensors`, or the files that `model.safetensors.index.json` names, memory-mapped; `rename` to None drops a key."""
    index = folder / "model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index ({type(error).__name__}: {error}); download it again") from error
    absent = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder} lacks {', '.join(absent)}: expected a hub folder with safetensors weights; download it again")
    state = {}
    try:
        for name in names:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  not a dict
                    if (new := rename(key)) is not None:
                        state[new] = file.get_tensor(key)
    except SafetensorError as error:
        raise UserError(f"{folder / name} is not a readable safetensors file ({error}): it may be truncated; download it again") from error
    return state
