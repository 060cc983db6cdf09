"""Which components learn."""

from __future__ import annotations

from collections.abc import Sequence

from infimed.contracts import COMPONENTS, UserError
from infimed.models.adapters import is_adapter
from infimed.models.vlm import InfiMed


def set_trainable(model: InfiMed, components: Sequence[str]) -> None:
    """Let the named components learn and freeze the others; of a component with adapters these alone learn.

    Raises:
        UserError: an unknown name, none at all, or adapters in a component that is not named.
    """
    unknown = sorted(set(components) - set(COMPONENTS))
    if unknown or not components:
        raise UserError(f"system.trainable is {list(components)}: expected one or more of {', '.join(COMPONENTS)}")
    for name in COMPONENTS:
        part = getattr(model, name)
        adapted = any(is_adapter(key) for key, _ in part.named_parameters())
        if adapted and name not in components:
            raise UserError(f"adapters.{name} would not learn: system.trainable is {list(components)}; add {name}, or drop the adapters")
        for key, parameter in part.named_parameters():
            parameter.requires_grad_(name in components and parameter.is_floating_point() and (is_adapter(key) or not adapted))
