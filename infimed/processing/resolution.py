"""How many pixels, patches and tokens an image becomes: the one dial of the low-to-high curriculum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from infimed.contracts import DataFault, UserError

MAX_ASPECT = 100
"""Longer than this many times its width, a picture is no picture: 1 x 20,000 pixels would be one patch row of smear."""


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Pixels, pool and tokens of one stage; weights fit every choice, since pooling has no parameters.

    Square (`image_size` given): the paper's plain resize, aspect ratio given up. Any aspect (`image_size` None): the picture keeps its
    shape, its sides become multiples of `patch_size * pool`, and its tokens stay within the two limits.

    Source: arXiv 2509.22261 (few tokens first); the arithmetic of any aspect is that of transformers' `lfm2_vl` image processor.
    """

    patch_size: int  # pixels
    image_size: int | None = None  # side of the square in pixels; None: any aspect
    visual_grid: int | None = None  # side of the grid of tokens that all patches are averaged to; None: blocks of pool x pool
    pool: int = 1  # patches a side of the block that one token stands for
    min_visual_tokens: int = 64  # of an image of any aspect
    max_visual_tokens: int | None = None  # of an image of any aspect

    def __post_init__(self) -> None:
        """Refuse what cannot be. Raises: UserError with everything that is wrong."""
        problems = []
        for name in ("patch_size", "image_size", "visual_grid", "pool", "min_visual_tokens", "max_visual_tokens"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                problems.append(f"resolution.{name}={value!r}: expected a positive whole number")
        if not problems:
            problems = self._square_problems() if self.image_size is not None else self._any_aspect_problems()
        if problems:
            raise UserError("\n".join(f"- {problem}" for problem in problems))

    def _square_problems(self) -> list[str]:
        side = self.image_size // self.patch_size
        own = f"the tower's own grid is {side} x {side} ({self.image_size} px in patches of {self.patch_size})"
        if side < 1:
            return [f"resolution.image_size={self.image_size} is less than a patch of {self.patch_size} pixels"]
        if self.visual_grid is not None:
            good = 1 <= self.visual_grid <= side
            return [] if good else [f"resolution.visual_grid={self.visual_grid}: expected 1 to {side}; {own}"]
        divisors = [d for d in range(1, side + 1) if side % d == 0]
        if self.pool not in divisors:
            choices = ", ".join(map(str, divisors))
            return [f"resolution.pool={self.pool} does not divide: {own}; expected one of {choices}, or a visual_grid"]
        return []

    def _any_aspect_problems(self) -> list[str]:
        problems = []
        if self.visual_grid is not None:
            problems.append(
                f"resolution.visual_grid={self.visual_grid} with images of any aspect: expected null (pool by blocks: resolution.pool=2)"
            )
        if self.max_visual_tokens is None:
            problems.append("resolution.max_visual_tokens is not set: images of any aspect need a limit, e.g. 256")
        elif self.max_visual_tokens < 2 * self.min_visual_tokens:  # between closer limits many shapes have no grid
            given = f"resolution.max_visual_tokens={self.max_visual_tokens} with min_visual_tokens={self.min_visual_tokens}"
            problems.append(f"{given}: expected at least twice as many")
        return problems

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width) in pixels that a picture is resized to."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        unit = self.patch_size * self.pool
        least, most = self.min_visual_tokens * unit**2, self.max_visual_tokens * unit**2
        sides = [max(unit, round(side / unit) * unit) for side in (height, width)]
        if sides[0] * sides[1] > most:
            shrink = math.sqrt(height * width / most)
            sides = [max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)]
        elif sides[0] * sides[1] < least:
            grow = math.sqrt(least / (height * width))
            sides = [math.ceil(side * grow / unit) * unit for side in (height, width)]
        return sides[0], sides[1]

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return (rows, columns) of patches of a picture."""
        tall, wide = self.size(width, height)
        return tall // self.patch_size, wide // self.patch_size

    def tokens(self, grid: tuple[int, int]) -> int:
        """Count the tokens that an image of `grid` patches takes among the text. The projector gives as many: a test compares them."""
        return self.visual_grid**2 if self.visual_grid is not None else (grid[0] // self.pool) * (grid[1] // self.pool)

    def tokens_of(self, width: int, height: int) -> int:
        """Count the tokens of a picture of `width` x `height` pixels; none for one that cannot be used, or not be read (0 x 0)."""
        return self.tokens(self.grid(width, height)) if self.fits(width, height) else 0

    @property
    def smallest(self) -> tuple[int, int]:
        """The smallest grid of patches that pooling takes."""
        return (1, 1) if self.visual_grid is not None else (self.pool, self.pool)

    @property
    def largest(self) -> tuple[int, int]:
        """The grid of the square, or of a square picture with as many tokens as are allowed."""
        if self.image_size is not None:
            return self.grid(1, 1)
        side = math.isqrt(self.max_visual_tokens) * self.pool
        return side, side

    def fits(self, width: int, height: int) -> bool:
        """Say whether a picture is one, and not too long and thin for its tokens."""
        if not 0 < max(width, height) <= MAX_ASPECT * min(width, height):
            return False
        return self.image_size is not None or self.tokens(self.grid(width, height)) <= self.max_visual_tokens

    def refuse(self, width: int, height: int) -> None:
        """Raise DataFault(image_aspect) for a picture that does not fit."""
        if not self.fits(width, height):
            fix = f"expected sides within {MAX_ASPECT}:1 that fit the visual tokens; cut it into pieces"
            raise DataFault("image_aspect", f"{width} x {height} pixels: {fix}")

    def describe(self) -> str:
        """Say in one line what an image becomes."""
        rows, columns = self.largest
        tall, wide = rows * self.patch_size, columns * self.patch_size
        grid, pool = self.visual_grid, self.pool
        pooled = f"blocks of {pool} x {pool}" if grid is None else f"averaged to {grid} x {grid}"
        kind = "square" if self.image_size is not None else f"any aspect, at least {self.min_visual_tokens} tokens, at most"
        return f"image: {kind} {wide} x {tall} px, {rows} x {columns} patches, {pooled} = {self.tokens(self.largest)} visual tokens"
