"""Low-rank adapters (LoRA) on any component, their base in four bits if wanted (QLoRA), and the way back to a plain model.

The order is fixed: build -> load base weights (plain names) -> `add_adapters` -> `freezing.set_trainable` -> compile, shard, optimise.
Injection renames what it wraps (`q_proj.weight` becomes `q_proj.base_layer.weight`), so hub weights go in before, our checkpoints after.
Adapters have the type of the matrix they adapt, on a four-bit base torch's default type. Quantised layers are for one device or DDP,
not for sharding.

Source: arXiv 2106.09685 (LoRA), 2305.14314 (QLoRA); peft `tuners/lora`, bitsandbytes `nn/modules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from infimed.contracts import COMPONENTS, UserError

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

NAME = "default"  # peft's name of the one adapter that a matrix can have here
BLOCK = 64  # weights that share a scale in four bits
Fate = Literal["changed", "unchanged", "quantised"]


@dataclass(frozen=True)
class AdapterSpec:
    """What one component is given."""

    rank: int
    alpha: float  # the adapter's output is scaled by alpha / rank
    targets: str | Sequence[str]  # a regex over whole module names, or module names, whole or their last parts
    dropout: float = 0.0
    quantise: Literal["nf4"] | None = None  # store the adapted matrices in four bits


@dataclass(frozen=True)
class AdapterReport:
    """What one component got."""

    component: str
    modules: tuple[str, ...]  # names inside the component
    trainable: int  # parameters of its adapters
    base: int  # parameters of the matrices that they adapt


def is_adapter(name: str) -> bool:
    """Say whether a parameter or state-dict key belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str | None:
    """Give a key of an adapted model the name that it has without adapters; None for the adapters' own."""
    return None if is_adapter(name) else name.replace(".base_layer.", ".")


def add_adapters(model: nn.Module, adapters: Mapping[str, Mapping]) -> tuple[AdapterReport, ...]:
    """Wrap the chosen matrices in place; of an adapted component the adapters learn and everything else is frozen.

    Adapters start at zero: the model computes what it did (up to the rounding to four bits where that is asked for). Other components are
    not touched. The initial values come from torch's global generator.

    Args:
        adapters: component name -> the fields of `AdapterSpec`, e.g. `{"language": {"rank": 16, "alpha": 32, "targets": ["q_proj"]}}`.

    Raises:
        UserError: naming every wrong option, every pattern that matches nothing (with near names), and packages that are missing.
    """
    specs, problems, chosen = {}, [], {}
    if not isinstance(adapters, Mapping) or not all(isinstance(options, Mapping) for options in adapters.values()):
        raise UserError(f"adapters={adapters!r}: expected a component's name and its options, as {{language: {{rank: 16, ...}}}}")
    for component, options in adapters.items():
        if component not in COMPONENTS:
            problems.append(f"adapters names `{component}`; expected one of {', '.join(COMPONENTS)}")
            continue
        spec, wrong = _read_spec(options)
        if spec:
            chosen[component], unmatched = _select(getattr(model, component), spec)
            specs[component] = spec
            wrong += unmatched
        problems += [f"adapters.{component}.{problem}" for problem in wrong]
    if problems:
        raise UserError("; ".join(problems))
    _need("peft", extra="lora", wanted=bool(specs))
    _need("bitsandbytes", extra="qlora", wanted=any(spec.quantise for spec in specs.values()))
    return tuple(_inject(component, getattr(model, component), chosen[component], spec) for component, spec in specs.items())


@torch.no_grad()
def merge_adapters(model: nn.Module) -> dict[str, Fate]:
    """Fold all adapters into their matrices and restore plain modules under the original names; returns each tensor's fate.

    A four-bit base comes back as what it computed with, the rounded values in their old type ("quantised", also when its adapter is zero):
    the merged model is the one that was trained, not an adapter on the unrounded weights. Sums are taken in float32 and rounded once.
    Base weights stay frozen.

    Raises:
        UserError: an adapter holds NaN or infinity; then nothing was merged.
    """
    layers = dict(_adapted(model))
    broken = [name for name, p in model.named_parameters() if is_adapter(name) and not p.isfinite().all()]
    if broken:
        raise UserError(f"{len(broken)} adapter matrices hold NaN or infinity, {broken[0]} the first: take a checkpoint from before that")
    fates: dict[str, Fate] = {}
    for name, layer in layers.items():
        base, quantised = _plain_linear(layer.base_layer)
        delta = layer.lora_B[NAME].weight.float() @ layer.lora_A[NAME].weight.float() * layer.scaling[NAME]
        merged = (base.weight.float() + delta).to(base.weight.dtype)
        moved = not torch.equal(merged, base.weight)
        fates[f"{name}.weight"] = "quantised" if quantised else "changed" if moved else "unchanged"
        base.weight.data = merged
        model.set_submodule(name, base.train(layer.training))
    for component in COMPONENTS:
        vars(getattr(model, component, None) or nn.Module()).pop("peft_config", None)
    return {key: fates.get(key, "unchanged") for key in model.state_dict()}


def _read_spec(options: Mapping) -> tuple[AdapterSpec | None, list[str]]:
    """Check the options of one component; the spec is None where it cannot even be written down."""
    known = {field.name for field in fields(AdapterSpec)}
    problems = [f"{name} is unknown; expected {', '.join(sorted(known))}" for name in sorted(set(options) - known)]
    problems += [f"{name} is missing" for name in ("rank", "alpha", "targets") if name not in options]
    if problems:
        return None, problems
    spec = AdapterSpec(**options)
    if isinstance(spec.rank, bool) or not isinstance(spec.rank, int) or spec.rank < 1:
        problems.append(f"rank is {spec.rank!r}; expected a whole number of at least 1, such as 16")
    if not isinstance(spec.alpha, int | float) or not spec.alpha > 0:
        problems.append(f"alpha is {spec.alpha!r}; expected a positive number, such as twice the rank")
    if not isinstance(spec.dropout, int | float) or not 0 <= spec.dropout < 1:
        problems.append(f"dropout is {spec.dropout!r}; expected a share from 0 up to, not including, 1")
    if spec.quantise not in (None, "nf4"):
        problems.append(f"quantise is {spec.quantise!r}; expected nf4, or none")
    return spec, problems


def _select(component: nn.Module, spec: AdapterSpec) -> tuple[list[str], list[str]]:
    """Find the linear layers that the patterns mean, and say what is wrong with the patterns."""
    targets = spec.targets
    modules = {name: module for name, module in component.named_modules() if name}
    linear = [name for name, module in modules.items() if type(module) is nn.Linear]
    chosen, problems = set(), []
    if any(p.device.type == "meta" for p in component.parameters()):
        problems.append("targets: the component has no values yet (meta device); load its weights before adding adapters")
    if next(_adapted(component), None):
        problems.append("targets: the component has adapters already; merge them first")
    for pattern in [targets] if isinstance(targets, str) else list(targets) or [""]:
        try:
            regex = re.compile(pattern if isinstance(targets, str) else rf"(?:.*\.)?{re.escape(str(pattern))}")
        except re.error as error:
            problems.append(f"targets `{pattern}` is not a regular expression ({error})")
            continue
        hits = [name for name in modules if regex.fullmatch(name)]
        if found := [name for name in linear if name in hits]:
            chosen.update(found)
        elif hits:
            kind = type(modules[hits[0]]).__name__
            problems.append(f"targets `{pattern}` means {hits[0]}, of type {kind}; only linear layers are adapted")
        else:
            problems.append(f"targets `{pattern}` matches no module; near names: {', '.join(_near(str(pattern), linear))}")
    problems += [f"targets: {name} {reason}" for name, reason in _untouchable(component).items() if name in chosen]
    # bitsandbytes 0.50.2 on CPUs with AVX-512 applies wrong scales to such rows, silently, and exports merge on a CPU.
    odd = [name for name in linear if name in chosen and modules[name].in_features % BLOCK] if spec.quantise else []
    if odd:
        width = modules[odd[0]].in_features
        problems.append(
            f"quantise: {odd[0]} has rows of {width}, no multiple of {BLOCK}: not safe in four bits; leave it out of the targets"
        )
    return [name for name in linear if name in chosen], problems


def _untouchable(component: nn.Module) -> dict[str, str]:
    """Name the linear layers that an adapter would be wrong on, with the reason."""
    names: dict[int, list[str]] = {}
    for name, parameter in component.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    reasons = {one: f"is tied to {next(o for o in same if o != one)}" for same in names.values() if len(same) > 1 for one in same}
    heads = getattr(component, "get_output_embeddings", lambda: None)()
    for name, module in component.named_modules():
        if module is heads:
            reasons.setdefault(name, "is the output head, whose matrix the loss reads directly, past any adapter")
    return {name: f"{reason}: it cannot be adapted; leave it out of the targets" for name, reason in reasons.items()}


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Suggest kinds of layers (numbers as `*`) whose last part resembles the pattern, or the first few of all."""
    kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names})
    leaves = {kind.rpartition(".")[2]: kind for kind in kinds}
    close = get_close_matches(pattern.rpartition(".")[2], leaves, n=3, cutoff=0.5)
    return [leaves[leaf] for leaf in close] or kinds[:8]


def _need(package: str, *, extra: str, wanted: bool) -> None:
    """Raise a UserError that names the extra when a package is wanted and absent."""
    if not wanted:
        return
    try:
        __import__(package)
    except ImportError as error:
        raise UserError(f"adapters need the package {package} ({error}): pip install 'infimed[{extra}]'") from error


def _inject(component: str, module: nn.Module, names: list[str], spec: AdapterSpec) -> AdapterReport:
    """Wrap the named layers of one component by peft."""
    from peft import LoraConfig, inject_adapter_in_model

    base = sum(module.get_submodule(name).weight.numel() for name in names)
    if spec.quantise:
        for name in names:
            module.set_submodule(name, _four_bit(module.get_submodule(name)))
    exactly = "|".join(map(re.escape, names))
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=exactly, bias="none")
    inject_adapter_in_model(config, module, NAME)
    wrapped = dict(_adapted(module))
    if list(wrapped) != names:
        raise RuntimeError(f"peft wrapped {len(wrapped)} layers of {component} where {len(names)} were meant; is its version supported?")
    for layer in wrapped.values():
        layer.train(layer.base_layer.training)  # born in training mode, with its dropout on, also inside a model that is evaluated
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return AdapterReport(component=component, modules=tuple(names), trainable=trainable, base=base)


def _adapted(module: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the wrapped layers, without importing peft."""
    return ((name, part) for name, part in module.named_modules() if hasattr(part, "base_layer") and hasattr(part, "lora_A"))


def _four_bit(linear: nn.Linear) -> nn.Module:
    """Copy a linear layer into NF4 with double quantisation, on the device where it is; the bias keeps its type."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantised = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,  # left open, the first input decides, and the bias is cast to that for good
        quant_type="nf4",
        device="meta",
    )
    weight = Params4bit(linear.weight.detach().clone(), requires_grad=False, blocksize=BLOCK, quant_type="nf4", module=quantised)
    quantised.weight = weight.to(linear.weight.device)  # this move is what quantises
    quantised.bias = linear.bias
    # On CPUs with AVX512-BF16 an evaluation step would repack the state for good, in bf16, and fails unless 32 divides the width.
    quantised.support_avx512bf16_for_cpu = False
    quantised.register_load_state_dict_pre_hook(_load_four_bit)
    return quantised.train(linear.training)


def _load_four_bit(
    module: nn.Module, state_dict: dict, prefix: str, _metadata: dict, _strict: bool, missing: list[str], *_: list[str]
) -> None:
    """Take quantised values together with their scales, which bitsandbytes saves but leaves to others to load."""
    from bitsandbytes.nn import Params4bit

    key = f"{prefix}weight"
    scales = {name.removeprefix(f"{key}."): state_dict.pop(name) for name in list(state_dict) if name.startswith(f"{key}.")}
    if scales and key in state_dict:
        module.weight = Params4bit.from_prequantized(state_dict[key], scales, device=module.weight.device, module=module)
    elif key in state_dict:  # its scales would stay those of other values
        missing.append(f"{key}.absmax")


def _plain_linear(base: nn.Module) -> tuple[nn.Linear, bool]:
    """Return the layer under an adapter as an ordinary one, and whether it had to be read back from four bits."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base, False
    from bitsandbytes.functional import dequantize_4bit

    plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
    plain.weight = nn.Parameter(dequantize_4bit(base.weight.data, state).to(state.dtype), requires_grad=False)
    plain.bias = base.bias
    return plain, True
