"""Put stored tensors into a module one at a time: whole, this rank's rows alone, or onto parameters that have no memory yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

ALL = slice(None)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its shape, and its values when asked for, all or some rows of the first dimension."""

    shape: tuple[int, ...]
    read: Callable[[slice], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Stored:
        """Wrap a tensor, memory-mapped or not."""
        return cls(tuple(tensor.shape), lambda rows: tensor if rows == ALL else tensor[rows])


def held(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's state, the parameters themselves and not copies."""
    return module.state_dict(keep_vars=True)


def tied(module: nn.Module) -> list[list[str]]:
    """Group the names that share one parameter."""
    groups: dict[int, list[str]] = {}
    for name, tensor in held(module).items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def unplaceable(module: nn.Module) -> dict[str, str]:
    """Say of which names the values cannot be put in place, and why."""
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    why = {name: "made by the layer itself, e.g. a quantised one: load before that" for name, t in held(module).items() if id(t) not in own}
    for name, tensor in held(module).items():
        cut = [place for place in getattr(tensor, "placements", ()) if not isinstance(place, Replicate)]
        if len(cut) > 1 or any(type(place) is not Shard or place.dim for place in cut):
            why[name] = f"placed as {tensor.placements}; expected rows over one dimension of the mesh (FSDP2)"
    return why


@torch.no_grad()
def fill(module: nn.Module, state: Mapping[str, Stored]) -> tuple[list[str], list[str]]:
    """Copy every tensor of a state that fits; converts types on the way.

    Returns:
        the names that hold NaN or infinity, and those tied to another name whose values are not the same. Each rank sees its own rows.
    """
    bad, unequal = [], []
    leader: dict[int, str] = {}
    placed: dict[int, torch.Tensor] = {}
    for name, tensor in held(module).items():
        rows, source = _rows(tensor), state[name]
        first = leader.setdefault(id(tensor), name)
        if first == name:
            values = source.read(rows)
            if not finite(values):
                bad.append(name)
            placed[id(tensor)] = _put(tensor, values)
        elif source is not state[first] and not torch.equal(source.read(rows), state[first].read(rows)):
            unequal.append(f"{name} is not {first}, and the model has one parameter for both")
        if (made := placed[id(tensor)]) is not tensor:
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, made)
    _rebuild_constants(module)
    return bad, unequal


def finite(values: torch.Tensor) -> bool:
    """Look for NaN and infinity at the price of reading once; no mask as large as the tensor is made."""
    if not values.is_floating_point() or not values.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(values.float() if values.dtype.itemsize == 1 else values))


def _rows(tensor: torch.Tensor) -> slice:
    """Return the rows that this rank holds: chunks of equal height, the last ones shorter or empty."""
    for mesh_dim, place in enumerate(getattr(tensor, "placements", ())):
        if isinstance(place, Shard):
            height = -(-tensor.shape[0] // tensor.device_mesh.size(mesh_dim))
            start = min(tensor.device_mesh.get_local_rank(mesh_dim) * height, tensor.shape[0])
            return slice(start, min(start + height, tensor.shape[0]))
    return ALL


def _put(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Copy into a tensor, or into a new one like it when it has no memory; returns the one that holds the values."""
    sharded = isinstance(tensor, DTensor)
    local = tensor.to_local() if sharded else tensor
    if not local.is_meta:
        local.copy_(values)
        return tensor
    made = torch.empty(values.shape, dtype=tensor.dtype, device=tensor.device_mesh.device_type if sharded else "cpu").copy_(values)
    if sharded:
        whole = {"shape": tensor.shape, "stride": tensor.stride()}
        made = DTensor.from_local(made, tensor.device_mesh, tensor.placements, run_check=False, **whole)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _rebuild_constants(module: nn.Module) -> None:
    """Give values to what is on the meta device and in no file, such as rotary frequencies: from the configuration of its owner."""
    device = next(module.parameters()).device
    for owner in module.modules():
        lost = [name for name, buffer in owner.named_buffers(recurse=False) if buffer.is_meta]
        if lost:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                again = type(owner)(owner.config)
            for name in lost:
                setattr(owner, name, again.get_buffer(name).to(device))
