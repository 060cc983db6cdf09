"""Load weights strictly: every missing, unexpected or mis-shaped key is reported, all at once. Never runs code from a file.

Files are memory-mapped and copied tensor by tensor into the parameters, converted to their type on the way; a parameter that is sharded
over ranks (a DTensor of FSDP2) takes its own rows and the rest of the file is not read; one on the meta device gets memory here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from infimed.contracts import UserError
from infimed.models.adapters import add_adapters, merge_adapters
from infimed.models.checkpoints import find_checkpoint, read_checkpoint, state_of
from infimed.models.hub import dimension_problems, dimensions_of, find_folder, vocabulary_problems, weight_files
from infimed.models.placement import ALL, Stored, fill, finite, held, tied, unplaceable
from infimed.models.vision import NaflexTower, PackedTower
from infimed.models.vlm import InfiMed
from infimed.processing.tokenizer import Tokenizer

SHOWN = 12  # keys in a message
UNUSED_IN_TOWER = ("text_model.", "logit_scale", "logit_bias", "head.")
PATCHES, POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
BLOCK = re.compile(r"encoder\.layers\.(\d+)\.")
CHUNK = 8192  # rows averaged at a time

Result = TypeVar("Result")


def load_checkpoint(model: InfiMed, path: str | Path) -> None:
    """Take the weights of one of our checkpoints (`init_from`): of the weights only, not of optimizer or position."""
    file = find_checkpoint(path)
    load_state_of(model, read_checkpoint(file, mmap=True), origin=str(file))


def load_state_of(model: InfiMed, checkpoint: Mapping, *, origin: str) -> None:
    """Take the weights out of a checkpoint that is already read; adapters in it are folded in: what is loaded is a plain model.

    Raises:
        UserError: as `load_state`.
    """
    adapters = checkpoint["infimed"].get("config", {}).get("adapters") or {}
    if not adapters:
        load_state(model, state_of(checkpoint), origin=origin)
        return
    state = state_of(checkpoint)
    if bad := [name for name, value in state.items() if not finite(value)]:
        raise UserError(_listed(f"{origin} holds NaN or infinity in {len(bad)} tensors; take another copy", bad))
    add_adapters(model, adapters)
    try:  # not `load_state`: matrices of four bits have keys that only their own modules can read
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{origin} does not fit this model with its adapters: {error}") from error
    merge_adapters(model)


def load_state(module: nn.Module, state: Mapping[str, torch.Tensor], *, origin: str) -> None:
    """Copy tensors into a module.

    Raises:
        UserError: naming every key that is missing, unexpected or of another shape, before anything is copied; or every tensor that holds
            NaN or infinity, in which case the module is not to be used.
    """
    _load([(module, {key: Stored.of(tensor) for key, tensor in state.items()}, origin)])


def load_hub_folders(
    model: InfiMed, *, vision: str | Path, language: str | Path, tokenizer: Tokenizer | None = None, grow_vocabulary: bool = False
) -> None:
    """Take tower and decoder from folders as published on the hub (safetensors, sharded or not); the projector stays as it is.

    Args:
        vision: SigLIP or SigLIP2, whole or its vision model alone; `language`: a causal LM of the decoder's class. Folders or hub names.
        tokenizer: what the decoder will be fed with; None: not compared with the folder's.
        grow_vocabulary: let the decoder have more rows than the folder; the surplus starts as the mean of the rows that are there.

    Raises:
        UserError: everything that is wrong with both folders, at once.
    """
    problems: list[str] = []
    folders = {part: _collect(problems, find_folder, given, part=part) for part, given in (("vision", vision), ("language", language))}
    files = {part: _collect(problems, weight_files, folder) for part, folder in folders.items() if folder}
    ours = {part: dimensions_of(getattr(model, part).config, part=part) for part in folders}
    ours["vision"].pop("num_hidden_layers")  # blocks after the one whose output is read are not built
    if grow_vocabulary:
        ours["language"].pop("vocab_size")
    for part, folder in folders.items():
        problems += dimension_problems(folder, part=part, model=ours[part]) if folder else []
    if folders["language"] and tokenizer:
        problems += vocabulary_problems(folders["language"], tokenizer)
    _refuse(problems)
    stored = {part: _collect(problems, _open, found) for part, found in files.items()}
    _refuse(problems)
    tower = _tower_state(model.vision, stored["vision"])
    decoder = _decoder_state(model.language, stored["language"], grow=grow_vocabulary)
    _load([(model.vision, tower, str(folders["vision"])), (model.language, decoder, str(folders["language"]))])


def check_vocabulary(model: InfiMed, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that makes ids which the decoder has no row for. Raises: UserError."""
    rows = model.language.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer uses {tokenizer.vocab_size} vocabulary rows, image tokens included, and the language model has {rows}: "
            f"choose the tokenizer of this model, or model.language.vocab_size={-(-tokenizer.vocab_size // 64) * 64}"
        )


def _collect(problems: list[str], call: Callable[..., Result], *given: object, **options: object) -> Result | None:
    """Call; what stands against it is added to the problems."""
    try:
        return call(*given, **options)
    except UserError as error:
        return problems.append(str(error))


def _refuse(problems: Iterable[str]) -> None:
    if problems := list(dict.fromkeys(problems)):
        raise UserError("\n".join(problems))


def _open(files: Iterable[Path]) -> dict[str, Stored]:
    """Map the tensors of safetensors files; nothing but their headers is read."""
    stored = {}
    for path in files:
        try:
            file = safe_open(path, framework="pt")
            stored |= {key: _stored(file, key) for key in file.keys()}  # noqa: SIM118  not a dict
        except SafetensorError as error:
            raise UserError(f"{path} is not a readable safetensors file ({error}): it may be truncated; download it again") from error
    return stored


def _stored(file: safe_open, key: str) -> Stored:
    view = file.get_slice(key)
    return Stored(tuple(view.get_shape()), lambda rows: file.get_tensor(key) if rows == ALL else view[rows])


def _tower_state(tower: PackedTower, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Keep what the tower has, under its names: both key styles, and a convolution as the matrix that SigLIP2-NaFlex has."""
    depth, state = len(tower.encoder.layers), {}
    unused = UNUSED_IN_TOWER if tower.post_layernorm is not None else (*UNUSED_IN_TOWER, "post_layernorm.")
    for name, tensor in stored.items():
        key = name.removeprefix("vision_model.")
        block = BLOCK.match(key)
        if not key.startswith(unused) and not (block and int(block[1]) >= depth):  # blocks after the feature layer are not built
            state[key] = tensor
    if isinstance(tower, NaflexTower) and PATCHES in state and len(state[PATCHES].shape) == 4:
        state[PATCHES] = _as_matrix(state[PATCHES])
    return state


def _as_matrix(convolution: Stored) -> Stored:
    """Turn [D, 3, p, p] into [D, p * p * 3], for patches in (row, column, channel) order."""
    width, channels, tall, wide = convolution.shape
    return Stored((width, tall * wide * channels), lambda rows: convolution.read(rows).permute(0, 2, 3, 1).flatten(1))


def _decoder_state(language: nn.Module, stored: Mapping[str, Stored], *, grow: bool) -> dict[str, Stored]:
    """Drop constants that old files hold, and add the rows of a grown vocabulary."""
    state = {key: tensor for key, tensor in stored.items() if not key.endswith("rotary_emb.inv_freq")}
    tables = {id(layer.weight) for layer in (language.get_input_embeddings(), language.get_output_embeddings())}
    for key, weight in language.named_parameters(remove_duplicate=False):
        if grow and id(weight) in tables and key in state and state[key].shape[0] < weight.shape[0]:
            state[key] = _grown(state[key], weight.shape[0])
    return state


def _grown(table: Stored, rows: int) -> Stored:
    """Add rows to an embedding: the mean of those that are there, which can be the likeliest token nowhere."""
    old = table.shape[0]

    def read(wanted: slice) -> torch.Tensor:
        start, stop, _ = wanted.indices(rows)
        kept = table.read(slice(min(start, old), min(stop, old)))
        if stop <= old:
            return kept
        total = sum(table.read(slice(at, at + CHUNK)).double().sum(0) for at in range(0, old, CHUNK))
        return torch.cat([kept, (total / old).to(kept.dtype).expand(stop - max(start, old), -1)])

    return Stored((rows, *table.shape[1:]), read)


def _load(jobs: list[tuple[nn.Module, dict[str, Stored], str]]) -> None:
    """Compare everything, then copy everything: (module, its tensors, where they come from), one a part."""
    for module, state, _ in jobs:
        for names in tied(module):  # files may have a tied parameter under one of its names
            if present := [name for name in names if name in state]:
                state |= {name: state[present[0]] for name in names if name not in state}
    _refuse(problem for module, state, origin in jobs for problem in _differences(module, state, origin))
    _refuse(problem for module, state, origin in jobs for problem in _copy(module, state, origin))


def _differences(module: nn.Module, state: Mapping[str, Stored], origin: str) -> list[str]:
    """Name every key that does not fit, as one problem."""
    own = held(module)
    lines = [f"missing: {key} {list(own[key].shape)}" for key in own.keys() - state.keys()]
    lines += [f"unexpected: {key} {list(state[key].shape)}" for key in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        theirs, ours = list(state[key].shape), list(own[key].shape)
        if theirs != ours:
            lines.append(f"shape: {key} is {theirs}, the model has {ours}{_advice(module, key, theirs)}")
    lines += [f"cannot be loaded: {key}: {why}" for key, why in unplaceable(module).items()]
    title = f"{origin} does not fit this model ({len(lines)} keys); choose the `model=` that it was made with"
    return [_listed(title, sorted(lines))] if lines else []


def _copy(module: nn.Module, state: Mapping[str, Stored], origin: str) -> list[str]:
    """Copy what fits; returns what is wrong with the values."""
    bad, unequal = fill(module, state)
    found = {f"{origin} holds NaN or infinity in {len(bad)} tensors; take another copy": bad, f"{origin} does not fit this model": unequal}
    return [_listed(title, lines) for title, lines in found.items() if lines]


def _advice(module: nn.Module, key: str, shape: list[int]) -> str:
    """Say what makes a table of positions fit."""
    table = isinstance(module, NaflexTower) and key == POSITIONS and len(shape) == 2
    return f": set model.vision.num_patches={shape[0]}" if table else ""


def _listed(title: str, lines: list[str]) -> str:
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([title, *lines[:SHOWN], *more])
