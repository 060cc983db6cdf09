"""Which components learn."""

from __future__ import annotations

from collections.abc import Sequence

from infimed.contracts import COMPONENTS, UserError
from infimed.models.vlm import InfiMed


def set_trainable(model: InfiMed, components: Sequence[str]) -> None:
    """Let the named components learn and freeze the others.

    Raises:
        UserError: an unknown name, or none at all.
    """
    unknown = sorted(set(components) - set(COMPONENTS))
    if unknown or not components:
        raise UserError(f"system.trainable is {list(components)}: expected one or more of {', '.join(COMPONENTS)}")
    for name in COMPONENTS:
        getattr(model, name).requires_grad_(name in components)
