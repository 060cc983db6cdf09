"""The typed root of every run, its stages, and the checks that are made before anything is loaded."""

from __future__ import annotations

import importlib
import inspect
from collections import abc
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from infimed.contracts import UserError
from infimed.data.store import is_remote
from infimed.models.hub import OWNERS, dimension_problems, find_folder, is_hub_name
from infimed.processing.resolution import Resolution

GIVEN_LATER = frozenset({"model", "image_token_id", "total_steps", "sources"})
"""Arguments that the entry point supplies; a configuration need not name them."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training run, resolved. Sections below the scalars are keyword arguments of what their `_target_` names."""

    name: str
    folder: str  # where its checkpoints and logs go
    seed: int
    starts_from: str | None
    init_from: str | None
    max_steps: int | None
    global_batch: int
    tokenizer: str
    weights: dict[str, str | None]
    model: dict[str, Any]
    adapters: dict[str, dict[str, Any]] | None  # component -> models.adapters.AdapterSpec
    compile: str  # auto | yes | no
    data: dict[str, Any]
    system: dict[str, Any]
    trainer: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]
    logger: dict[str, dict[str, Any]]


ROOT = frozenset(f.name for f in fields(Stage)) | {"run_dir", "resolution", "resume_from", "cpu_threads", "stages", "evaluation", "ckpt"}
"""Every key of the page."""


def stages(config: DictConfig) -> list[Stage]:
    """Resolve a composed configuration into its stages, checked: one, or as many as `stages` names, each a diff over the page.

    Raises:
        UserError: everything that is wrong with all of them, at once.
    """
    folder = run_folder(config)
    evaluation_of(config)
    diffs: dict[str, dict[str, Any]] = resolve(config).get("stages") or {}
    made, problems = [], []
    for number, (name, diff) in enumerate(diffs.items() or [(config.name, {})], 1):
        at = folder / f"{number}_{name}" if diffs else folder
        start = f"{made[-1].folder}/last.ckpt" if made else config.init_from
        page = resolve(_from_hub_cache(lay_over(config, {**diff, "init_from": start, "folder": str(at)})))
        problems += [f"there is no option `{key}`{nearest(key, ROOT)}" for key in page if key not in ROOT]
        stage = Stage(**{f.name: page[f.name] for f in fields(Stage)})
        problems += check(stage, first=not made)
        made.append(stage)
    if problems:
        raise UserError("\n".join(f"- {problem}" for problem in dict.fromkeys(problems)))
    return made


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The questions that a checkpoint is asked, and how."""

    shards: Sequence[str]
    train: Sequence[str]  # what the majority answer is learned from
    limit: int | None = None  # questions, spread evenly; null: all
    max_new_tokens: int = 16
    batch_size: int = 64
    cluster_by: str = "image"  # what intervals resample: image | patient


def evaluation_of(config: DictConfig) -> Evaluation | None:
    """Read and check the section `evaluation`, if there is one.

    Raises:
        UserError: everything that is wrong with it.
    """
    section = resolve(config)["evaluation"]
    if section is None:
        return None
    problems = bind({"_target_": "infimed.config.Evaluation", **section}, "evaluation")
    for option in ("shards", "train"):
        problems += missing_shards(section.get(option) or (), f"evaluation.{option}", "TOKENIZER_FOLDER")
    for option in ("limit", "max_new_tokens", "batch_size"):
        if isinstance(section.get(option), int) and section[option] < 1:
            problems.append(f"evaluation.{option}={section[option]}: expected at least 1")
    if section.get("cluster_by", "image") not in ("image", "patient"):
        problems.append(f"evaluation.cluster_by={section['cluster_by']}: expected image or patient")
    if problems:
        raise UserError("\n".join(f"- {problem}" for problem in problems))
    return Evaluation(**section)


def shadowed(config: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Name command-line values that a chain's stages set again, so that they would have no effect."""
    found = []
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        node, _, last = key.rpartition(".")
        for name, diff in (config.get("stages") or {}).items():
            inner = OmegaConf.select(diff, node) if node else diff
            if not OmegaConf.is_dict(inner) or last not in inner or OmegaConf.is_interpolation(inner, last):
                continue
            if not OmegaConf.is_dict(inner[last]):
                found.append(f"{override} has no effect: stage {name} sets {key} itself; write stages.{name}.{key}=...")
    return found


def run_folder(config: DictConfig) -> Path:
    """Return the folder of a run: a new one, or the one that `resume_from` continues."""
    if not config.resume_from:
        return Path(config.run_dir)
    if config.init_from:
        raise UserError("resume_from takes everything of a run and init_from the weights alone: give one of them")
    path = Path(config.resume_from)
    if not path.exists():
        raise UserError(f"resume_from={path} does not exist: expected a run folder or its last.ckpt")
    folder = (path.parent if path.is_file() else path).resolve()
    stages_here = [folder / f"{number}_{name}" for number, name in enumerate(config.get("stages") or {}, 1)] or [folder]
    if not any((at / "last.ckpt").is_file() for at in stages_here):
        expected = ", ".join(f"{at.name}/last.ckpt" if at != folder else "last.ckpt" for at in stages_here)
        raise UserError(f"resume_from={path} holds nothing to go on from: expected {expected} in it")
    return folder


def resolve(config: DictConfig) -> dict[str, Any]:
    """Turn a composed configuration into plain values."""
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the configuration does not resolve: {str(error).splitlines()[0]}") from error


def lay_over(config: DictConfig, diff: dict[str, Any]) -> DictConfig:
    """Lay a diff over a page before anything is resolved; in the open dictionaries a null takes an entry away."""
    page = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(config)), diff)
    for section, key in (("data", "select"), ("data", "mixture"), ("system", "component_lr")):
        given = page[section].get(key)
        for name in [n for n, value in given.items() if value is None] if OmegaConf.is_dict(given) else ():
            del given[name]
    return page


def check(stage: Stage, *, first: bool) -> list[str]:
    """Name everything that would stop a stage later: wrong arguments, missing files, and how to get them."""
    hints = get_type_hints(Stage)
    if wrong := [f.name for f in fields(stage) if not _fits(getattr(stage, f.name), hints[f.name])]:
        experiments = "no experiment is chosen; try experiment=quickstart" if wrong == ["tokenizer"] else ""
        return [f"{name}={getattr(stage, name)!r}: expected {_spell(hints[name])}; {experiments}".rstrip("; ") for name in wrong]
    problems = [
        p for section in ("model", "data", "system", "trainer", "callbacks", "logger") for p in bind(getattr(stage, section), section)
    ]
    if stage.starts_from and not stage.init_from and not Path(stage.folder, "last.ckpt").exists():
        where = f"logs/{stage.starts_from}/latest"
        problems.append(f"init_from is not set: {stage.name} starts from the weights of {stage.starts_from}, e.g. init_from={where}")
    elif stage.init_from and first and not Path(stage.init_from).exists() and not Path(stage.init_from + ".ckpt").exists():
        problems.append(f"init_from={stage.init_from} does not exist: expected a checkpoint (.ckpt) or a run folder")
    if first and not stage.init_from and not Path(stage.folder, "last.ckpt").exists():
        problems += _missing_weights(stage)
    if not (Path(stage.tokenizer) / "tokenizer.json").is_file() and not Path(stage.tokenizer).is_file():
        problems.append(f"tokenizer={stage.tokenizer}: no tokenizer.json there; the language model's hub folder has one")
    for option in ("train", "val"):
        problems += missing_shards(stage.data.get(option) or (), f"data.{option}", stage.tokenizer)
    if stage.compile not in ("auto", "yes", "no"):
        problems.append(f"compile={stage.compile}: expected auto, yes or no")
    if stage.max_steps is not None and stage.max_steps < 1:
        problems.append(f"max_steps={stage.max_steps}: expected at least 1, or null for all of data.epochs")
    try:
        Resolution(**{key: value for key, value in stage.model.get("resolution", {}).items() if key != "_target_"})
    except UserError as error:
        problems += [line.removeprefix("- ") for line in str(error).splitlines()]
    except TypeError:
        pass  # a wrong name, which `bind` has named
    rows = stage.data.get("packs_per_batch", 1)
    if isinstance(rows, int) and rows > 0 and (stage.global_batch < 1 or stage.global_batch % rows):
        problems.append(f"global_batch={stage.global_batch} is not a positive multiple of data.packs_per_batch={rows}")
    if any(stage.weights.values()) and not all(stage.weights.values()) and not stage.init_from:
        problems.append("weights: give both vision and language, or neither")
    if stage.max_steps is None and stage.data.get("epochs") is None:
        problems.append("max_steps and data.epochs are both null: set one, or training has no end")
    return problems


def missing_shards(patterns: Sequence[str], option: str, tokenizer: str) -> list[str]:
    """Name shards that are asked for and absent, with the command that makes them."""
    if isinstance(patterns, str):
        return [f"{option}={patterns}: expected a list of shard files, folders or patterns, such as [{patterns}]"]
    return [
        f"{option} names {pattern}, which does not exist: make shards with "
        f"`python tools/make_shards.py INPUT.jsonl --images DIR --out {pattern} --tokenizer {tokenizer}`"
        for pattern in patterns
        if not is_remote(str(pattern)) and not glob(pattern)  # what is remote is looked at when it is opened
    ]


def _from_hub_cache(page: DictConfig) -> DictConfig:
    """Put the cache's folder in the place of a hub name, before what refers to it is resolved; a name that is not there stays."""
    for part in OWNERS:
        given = OmegaConf.select(page, f"weights.{part}", throw_on_resolution_failure=False)
        if isinstance(given, str) and is_hub_name(given):
            with suppress(UserError):  # named by `_missing_weights`
                page.weights[part] = str(find_folder(given, part=part))
    return page


def _missing_weights(stage: Stage) -> Iterable[str]:
    """Name weights that are asked for and absent, with the command that fetches them, or that belong to a model of other dimensions."""
    for part, given in stage.weights.items():
        if part not in OWNERS:
            yield f"weights.{part}: expected {' or '.join(OWNERS)}"
        elif given:
            section = stage.model.get(part) or {}
            built_from_folder = {"vocab_size"} if "folder" in section else set()  # it may be larger than the folder's
            try:
                folder = find_folder(given, part=part)
            except UserError as error:
                yield str(error)
            else:
                yield from dimension_problems(folder, part=part, model={k: v for k, v in section.items() if k not in built_from_folder})


def bind(node: Any, path: str) -> list[str]:  # noqa: ANN401  a configuration node can be anything
    """Check a section against the signatures of what it builds: names, missing arguments, types of plain values."""
    if isinstance(node, list):
        return [p for i, item in enumerate(node) for p in bind(item, f"{path}[{i}]")]
    if not isinstance(node, Mapping):
        return []
    problems = [p for key, value in node.items() for p in bind(value, f"{path}.{key}")]
    if "_target_" in node:
        problems += _bind_target(node, path)
    return problems


def _bind_target(node: Mapping[str, Any], path: str) -> list[str]:
    module, _, name = str(node["_target_"]).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        return [f"{path}._target_={node['_target_']} cannot be imported: {error}"]
    signature = inspect.signature(target)
    known = {n: p for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    arguments = {k: v for k, v in node.items() if not k.startswith("_")}
    problems = (
        [] if open_ended else [f"{path}.{key}: {name} has no such option{nearest(key, known)}" for key in arguments if key not in known]
    )
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in arguments and key not in GIVEN_LATER:
            problems.append(f"{path}.{key} is not set; {name} needs it")
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for key, value in arguments.items():
        if key in hints and not _fits(value, hints[key]):
            problems.append(f"{path}.{key}={value!r}: expected {_spell(hints[key])}")
    return problems


def _fits(value: object, hint: object) -> bool:
    """Say whether a plain value fits a plain annotation; what is not plain is not judged."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if hint is NoneType:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if get_origin(hint) in (dict, abc.Mapping):
        return isinstance(value, Mapping)
    if get_origin(hint) in (list, abc.Sequence):
        return isinstance(value, Sequence) and not isinstance(value, str)
    return True


def _spell(hint: object) -> str:
    """Say what a value may be as one would write it."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_spell, get_args(hint)))
    if get_origin(hint) in (dict, abc.Mapping):
        return f"{{name: {_spell(get_args(hint)[1])}}}"
    if get_origin(hint) in (list, abc.Sequence):
        return f"[{_spell(get_args(hint)[0])}, ...]"
    return "None" if hint is NoneType else getattr(hint, "__name__", str(hint))


def nearest(given: str, valid: Iterable[str]) -> str:
    """Suggest the nearest valid name: `; did you mean ...?`, or the list of all."""
    choices = sorted(valid)
    close = get_close_matches(given, choices, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else f"; valid: {', '.join(choices)}"
