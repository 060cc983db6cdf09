"""What a training step keeps in a device's memory: states, and what forward leaves for backward.

Weights, gradients and optimizer states are exact. Activations are the tensors that autograd or the compiler keeps of a block, term by term;
the tests count the same bytes on real blocks. What a kernel or a compiler on a GPU chooses may differ: hence the band around the sum. Sums
are those of a step that accumulates, in which gradients and activations live side by side. Not in here: the device's context, the buffers
of the communication library and what the allocator loses between tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal, get_args

from infimed.contracts import UserError
from infimed.processing.flops import LanguageShape, ModelShape, VisionShape, Work, check_components

GIB = 2**30

Saved = Literal["eager", "compiled", "products", "full"]
"""What a block keeps for backward: all that eager autograd does, what torch.compile's partitioner does, the outputs of matrix products and
attention alone (selective checkpointing), or nothing but its input (full checkpointing)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Bytes a trained parameter costs; a frozen one costs the 2 of bf16 in every recipe."""

    weights: float
    gradients: float
    optimizer: float


RECIPES = {
    "fp32": Recipe(weights=4, gradients=4, optimizer=8),  # AdamW, computed in bf16 copies
    "bf16_fp32_states": Recipe(weights=2, gradients=2, optimizer=8),
    "bf16_kahan": Recipe(weights=2, gradients=2, optimizer=6),  # two moments and what rounding lost
    "bf16": Recipe(weights=2, gradients=2, optimizer=4),  # AdamW with stochastic rounding
    "bf16_8bit": Recipe(weights=2, gradients=2, optimizer=2.06),  # two one-byte moments with a scale a block
    "bf16_host": Recipe(weights=2, gradients=0, optimizer=0),  # gradients and moments in the host's memory
}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The choices that memory depends on."""

    recipe: str = "fp32"
    language: Saved = "compiled"
    vision: Saved = "full"  # matters only where the tower learns
    shards: int = 1  # ranks that share the states (full sharding)
    chunk_rows: int = 2048  # rows whose logits exist at a time
    bytes_per_logit: int = 6  # bf16 and its float32 copy

    def __post_init__(self) -> None:
        """Refuse what does not exist.

        Raises:
            UserError: an unknown recipe or policy, or a count below 1.
        """
        if self.recipe not in RECIPES:
            raise UserError(f"memory recipe is {self.recipe!r}: expected one of {', '.join(RECIPES)}")
        if not {self.language, self.vision} <= set(get_args(Saved)):
            raise UserError(f"saved activations are {self.language!r} and {self.vision!r}: expected of {', '.join(get_args(Saved))}")
        if min(self.shards, self.chunk_rows) < 1:
            raise UserError(f"shards is {self.shards} and chunk_rows {self.chunk_rows}: expected at least 1 each")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int  # whole bf16 copies and gradients of the blocks in flight
    vision: int  # activations
    projector: int
    language: int
    logits: int  # logits of a chunk, and the head's gradient accumulated in float32

    @property
    def states(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def band(self) -> tuple[int, int]:
        """The least and the most to expect: states are certain, the rest to a tenth."""
        margin = (self.total - self.states) // 10
        return self.total - margin, self.total + margin

    def fits(self, budget: int) -> Literal["yes", "close", "no"]:
        """Tell whether the band is below `budget` bytes, around it, or above."""
        low, high = self.band
        if high <= budget:
            return "yes"
        return "close" if low <= budget else "no"


def memory(shape: ModelShape, work: Work, *, trained: Collection[str], plan: MemoryPlan) -> Memory:
    """Add up what one rank holds.

    Args:
        work: one rank's micro-batch.
        trained: the components that learn.
    """
    check_components(trained)
    recipe = RECIPES[plan.recipe]
    parts = {"vision": shape.vision, "projector": shape.projector, "language": shape.language}
    learning = sum(part.parameters for name, part in parts.items() if name in trained)
    return Memory(
        weights=_shard(recipe.weights * learning + 2 * (shape.parameters - learning), plan.shards),
        gradients=_shard(recipe.gradients * learning, plan.shards),
        optimizer=_shard(recipe.optimizer * learning, plan.shards),
        gathered=_gathered(shape.language, plan, trained="language" in trained),
        vision=_vision(shape.vision, work, plan.vision) if "vision" in trained else 0,
        projector=2 * shape.projector.saved * work.visual_tokens if {"vision", "projector"} & set(trained) else 0,
        language=_language(shape.language, work, plan.language, trained="language" in trained) if trained else 0,
        logits=min(plan.chunk_rows, work.supervised) * shape.language.vocab * plan.bytes_per_logit
        + (4 * shape.language.head_products if "language" in trained else 0),
    )


def language_block_bytes(shape: LanguageShape, saved: Saved, *, trained: bool) -> int:
    """Return the bytes that a decoder block keeps of a token, in bf16 with norms computed in float32 as transformers does.

    Args:
        trained: whether its weights learn; a frozen block in the gradient's way keeps less, for no weight's gradient needs an input.
    """
    width, query, key, inner = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate
    normed = 2 * width + query + key  # numbers that pass a norm: both block norms, query norm, key norm
    attention = 2 * (2 * query + 2 * key) + 4 * shape.heads  # query and key after RoPE, value, output; log-sum-exp of each head
    statistics = 4 * (2 + shape.heads + shape.kv_heads)  # float32, of each norm
    inputs = 2 * (2 * width + inner) * trained  # of q/k/v, gate/up and down, for their weights' gradients; attention's output is o's
    if saved == "eager":  # float32 inputs of the norms, and what their weights multiply; gate, silu(gate), up
        return 4 * normed + 2 * normed * trained + statistics + attention + 3 * 2 * inner + inputs
    if saved == "compiled":  # bf16 inputs of the norms; gate, up
        return 2 * normed + statistics + attention + 2 * 2 * inner + inputs
    if saved == "products":  # block input; query, key, value; attention output; its projection; gate, up
        return 2 * (2 * width + 2 * query + 2 * key + 2 * inner) + 4 * shape.heads
    return 2 * width


def vision_block_bytes(shape: VisionShape, saved: Saved) -> int:
    """Return the bytes that a trained tower block keeps of a patch, in bf16; the compiler finds nothing to leave out."""
    if saved == "full":
        return 2 * shape.width
    lse = 4 * shape.heads
    if saved == "products":  # block input; query, key, value; attention output; its projection; first product of the MLP
        return 2 * (6 * shape.width + shape.intermediate) + lse
    statistics = 4 * 4  # mean and deviation of both norms
    return 2 * (8 * shape.width + 2 * shape.intermediate) + lse + statistics  # and both norms' outputs, and the GELU's


def _language(shape: LanguageShape, work: Work, saved: Saved, *, trained: bool) -> int:
    """Sum the decoder's activations: blocks, RoPE's two tables, the final norm."""
    block = language_block_bytes(shape, saved, trained=trained)
    again = max(0, language_block_bytes(shape, "compiled", trained=trained) - block)  # what one block recomputes
    rope = 2 * 2 * shape.head_dim
    final = (6 if trained else 4) * shape.width + 4
    return work.tokens * (shape.layers * block + again + rope + final)


def _vision(shape: VisionShape, work: Work, saved: Saved) -> int:
    """Sum the tower's activations: blocks, and the patches that the patch embedding reads."""
    block = vision_block_bytes(shape, saved)
    again = max(0, vision_block_bytes(shape, "compiled") - block)
    return work.patches * (shape.layers * block + again + 2 * shape.patch_dim)


def _gathered(shape: LanguageShape, plan: MemoryPlan, *, trained: bool) -> int:
    """Sum the bf16 copies beside sharded or float32 states: two blocks and the table, and the gradients of one block and the table."""
    if plan.shards == 1 and RECIPES[plan.recipe].weights == 2:
        return 0
    weights = 2 * shape.block_parameters + shape.head_products
    gradients = shape.block_parameters + shape.head_products if trained else 0
    return 2 * (weights + gradients)


def _shard(count: float, shards: int) -> int:
    """Return this rank's part, rounded up."""
    return -int(-count // shards)
