"""From patch features to the language model's width: five choices, one interface (`Projector`).

Shape letters: P patches of all images end to end, N images of equal grid, R rows, C columns, K patches of one image, Q queries,
V visual tokens, D tower width, H width on the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import groupby
from math import gcd

import torch
from torch import nn
from torch.nn import functional as F

from infimed.contracts import UserError

Grid = tuple[int, int]
"""Rows and columns of an image in patches: plain numbers, so that nothing waits for the device."""


class Projector(nn.Module, ABC):
    """Gather an image's patches into its visual tokens, then read them out at the language model's width.

    A subclass says how many tokens a grid gives (`tokens`), how images of one grid are gathered, and how rows are read out.
    Images never see each other. `Linear` and `Conv2d` keep torch's initialisation, so `reset_parameters` fills what was built on meta.
    Left out of torch.compile: every composition of grids would be a graph of its own.
    """

    def __init__(self, *, in_features: int, out_features: int) -> None:
        """Remember the widths: `in_features` of the tower, `out_features` of the language model."""
        super().__init__()
        _check_positive(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features

    @abstractmethod
    def tokens(self, grid: Grid) -> int:
        """Count the visual tokens of an image of `grid` = rows x columns patches.

        Raises:
            UserError: this projector cannot take such a grid.
        """

    def forward(self, features_PD: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Project the patches of many images; neighbours of equal grid go as one batch.

        Args:
            features_PD: float[P, in_features], the images end to end, each row-major.
            grids: rows and columns of each image.

        Returns:
            float[V, out_features], the visual tokens of all images, in their order; `tokens(grid)` rows each.

        Raises:
            UserError: a grid does not fit.
            ValueError: the grids do not account for the patches.
        """
        if (patches := sum(rows * columns for rows, columns in grids)) != len(features_PD):
            raise ValueError(
                f"{len(features_PD)} patch features, but the {len(grids)} grids hold {patches} patches: give the grids that the tower saw"
            )
        if not grids:
            return features_PD.new_zeros(0, self.out_features)
        gathered, start = [], 0
        for (rows, columns), run in groupby(grids):
            self.tokens((rows, columns))  # loud before anything is computed
            count = sum(1 for _ in run)
            stop = start + count * rows * columns
            gathered.append(self._gather(features_PD[start:stop].unflatten(0, (count, rows, columns))).flatten(0, 1))
            start = stop
        return self._read_out(torch.cat(gathered) if len(gathered) > 1 else gathered[0])

    @abstractmethod
    def _gather(self, features_NRCD: torch.Tensor) -> torch.Tensor:
        """Turn images of one grid into float[N, V, H]."""

    @abstractmethod
    def _read_out(self, gathered_VH: torch.Tensor) -> torch.Tensor:
        """Turn rows, each for itself, into float[V, out_features]."""


class _MLP(Projector):
    """Linear - GELU (erf) - Linear after a gathering without parameters: stock LLaVA's and LFM2-VL's parameter names."""

    def __init__(self, *, in_features: int, out_features: int, hidden_features: int | None = None, fold: int = 1) -> None:
        """Build both layers; `fold` patches side by side make one row, `hidden_features` is `out_features` when None."""
        super().__init__(in_features=in_features, out_features=out_features)
        hidden = out_features if hidden_features is None else hidden_features
        _check_positive(hidden_features=hidden)
        self.linear_1 = nn.Linear(in_features * fold, hidden)
        self.linear_2 = nn.Linear(hidden, out_features)

    def _read_out(self, gathered_VH: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(gathered_VH)))


class AveragePoolMLP(_MLP):
    """Adaptive average pooling of the patch grid, then Linear - GELU - Linear.

    Pooling has no parameters, so a checkpoint trained at one `visual_grid` loads at any other.

    Source: arXiv 2504.00595 (the parent recipe); arXiv 2509.22261 (adaptive average pooling).
    """

    def __init__(self, *, in_features: int, out_features: int, visual_grid: int) -> None:
        """Build the projector; `visual_grid` squared is the number of visual tokens an image."""
        super().__init__(in_features=in_features, out_features=out_features)
        _check_positive(visual_grid=visual_grid)
        self.visual_grid = visual_grid

    def tokens(self, grid: Grid) -> int:
        """Count the visual tokens of an image: the same for every grid; a smaller one than visual_grid repeats its patches."""
        return self.visual_grid**2

    def _gather(self, features_NRCD: torch.Tensor) -> torch.Tensor:
        return _adaptive_pool(features_NRCD, self.visual_grid).flatten(1, 2)


class BlockPoolMLP(_MLP):
    """Average over blocks of pool x pool patches, then Linear - GELU - Linear, for images of any aspect.

    The same parameters as `AveragePoolMLP`, so weights carry over between the two and between pools.
    """

    def __init__(self, *, in_features: int, out_features: int, pool: int, hidden_features: int | None = None) -> None:
        """Build the projector; `pool` is the side of a block in patches."""
        super().__init__(in_features=in_features, out_features=out_features, hidden_features=hidden_features)
        _check_positive(pool=pool)
        self.pool = pool

    def tokens(self, grid: Grid) -> int:
        """Count the visual tokens of an image: one a block."""
        return _block_tokens(grid, "pool", self.pool)

    def _gather(self, features_NRCD: torch.Tensor) -> torch.Tensor:
        return _blocks(features_NRCD, self.pool).mean((2, 4)).flatten(1, 2)


class UnshuffleMLP(_MLP):
    """Lay the factor x factor patches of a block side by side (pixel-unshuffle), then [LayerNorm] - Linear - GELU - Linear.

    Source: transformers models/lfm2_vl/modeling_lfm2_vl.py, `Lfm2VlMultiModalProjector`: the same maths, order and parameter names.
    """

    def __init__(
        self, *, in_features: int, out_features: int, factor: int, hidden_features: int | None = None, pre_norm: bool = False
    ) -> None:
        """Build the projector; `factor` is the side of a block in patches, `pre_norm` normalises the block before the MLP."""
        _check_positive(factor=factor)
        super().__init__(in_features=in_features, out_features=out_features, hidden_features=hidden_features, fold=factor**2)
        self.factor = factor
        self.layer_norm = nn.LayerNorm(in_features * factor**2) if pre_norm else None

    def tokens(self, grid: Grid) -> int:
        """Count the visual tokens of an image: one a block."""
        return _block_tokens(grid, "factor", self.factor)

    def _gather(self, features_NRCD: torch.Tensor) -> torch.Tensor:
        return _blocks(features_NRCD, self.factor).transpose(2, 3).flatten(3).flatten(1, 2)

    def _read_out(self, gathered_VH: torch.Tensor) -> torch.Tensor:
        return super()._read_out(gathered_VH if self.layer_norm is None else self.layer_norm(gathered_VH))


class PerceiverResampler(Projector):
    """Learned queries read an image by cross-attention: the same number of visual tokens for every grid.

    Each layer attends from the queries to [features; queries], as in Flamingo and Idefics2, so a query sees the others too. Pre-norm
    blocks of the tower's width with a GELU MLP (Flamingo); queries drawn at std 0.02 (Idefics2 starts them all at one, hence alike).
    Nothing here knows where a patch lies: the tower's position embeddings must say so.

    Source: arXiv 2204.14198 (Flamingo); transformers models/idefics2/modeling_idefics2.py.
    """

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        tokens_per_image: int,
        depth: int = 3,
        heads: int = 16,
        hidden_features: int | None = None,
    ) -> None:
        """Build the resampler of `depth` layers; `hidden_features` is the width inside their MLPs, 4 * in_features when None."""
        super().__init__(in_features=in_features, out_features=out_features)
        hidden = 4 * in_features if hidden_features is None else hidden_features
        _check_positive(tokens_per_image=tokens_per_image, depth=depth, heads=heads, hidden_features=hidden)
        if in_features % heads:
            fitting = [n for n in range(1, in_features + 1) if in_features % n == 0]
            nearest = min(fitting, key=lambda n: abs(n - heads))
            raise UserError(f"heads={heads} does not divide in_features={in_features}: the nearest that does is heads={nearest}")
        self.tokens_per_image = tokens_per_image
        self.queries = nn.Parameter(torch.empty(tokens_per_image, in_features))
        self.layers = nn.ModuleList(_PerceiverLayer(in_features, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(in_features)
        self.out = nn.Linear(in_features, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the queries anew."""
        nn.init.trunc_normal_(self.queries, std=0.02)

    def tokens(self, grid: Grid) -> int:
        """Count the visual tokens of an image: the same for every grid."""
        return self.tokens_per_image

    def _gather(self, features_NRCD: torch.Tensor) -> torch.Tensor:
        features_NKD = features_NRCD.flatten(1, 2)
        queries_NQD = self.queries.expand(len(features_NKD), -1, -1)
        for layer in self.layers:
            queries_NQD = layer(queries_NQD, features_NKD)
        return queries_NQD

    def _read_out(self, gathered_VH: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(gathered_VH))


class _PerceiverLayer(nn.Module):
    """Pre-norm attention from queries to [features; queries], then a pre-norm MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.feature_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, queries_NQD: torch.Tensor, features_NKD: torch.Tensor) -> torch.Tensor:
        """Let the queries of each image read that image once more: float[N, Q, D]."""
        normed_NQD = self.query_norm(queries_NQD)
        context_NLD = torch.cat([self.feature_norm(features_NKD), normed_NQD], dim=1)
        q, k, v = (
            projection(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, rows in ((self.q_proj, normed_NQD), (self.k_proj, context_NLD), (self.v_proj, context_NLD))
        )
        read_NQD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries_NQD = queries_NQD + self.o_proj(read_NQD)
        return queries_NQD + self.mlp(self.mlp_norm(queries_NQD))


class CAbstractor(Projector):
    """Convolution blocks - adaptive average pool - convolution blocks - MLP: neighbours are mixed before and after the pooling.

    As in Honeybee: RegNet bottlenecks (depth-wise 3 x 3, squeeze-and-excite at a quarter of the width, SiLU), LayerNorm over channels at
    each position, a SiLU MLP of two layers. Ours: no learned position embeddings (they fix the grid; SigLIP's features carry position)
    and no learned end tokens.

    Source: arXiv 2312.06742; github.com/khanrc/honeybee honeybee/projectors/projectors.py; arXiv 2003.13678 (the block).
    """

    def __init__(self, *, in_features: int, out_features: int, visual_grid: int, depth: int = 3, hidden_features: int = 1024) -> None:
        """Build `depth` blocks of width `hidden_features` before and after the pooling to visual_grid x visual_grid."""
        super().__init__(in_features=in_features, out_features=out_features)
        _check_positive(visual_grid=visual_grid, depth=depth, hidden_features=hidden_features)
        self.visual_grid = visual_grid
        self.before = nn.Sequential(*(_ConvBlock(in_features if i == 0 else hidden_features, hidden_features) for i in range(depth)))
        self.after = nn.Sequential(*(_ConvBlock(hidden_features, hidden_features) for _ in range(depth)))
        self.mlp = nn.Sequential(nn.Linear(hidden_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features))

    def tokens(self, grid: Grid) -> int:
        """Count the visual tokens of an image: the same for every grid; a smaller one than visual_grid repeats its patches."""
        return self.visual_grid**2

    def _gather(self, features_NRCD: torch.Tensor) -> torch.Tensor:
        return self.after(_adaptive_pool(self.before(features_NRCD), self.visual_grid)).flatten(1, 2)

    def _read_out(self, gathered_VH: torch.Tensor) -> torch.Tensor:
        return self.mlp(gathered_VH)


class _ConvBlock(nn.Module):
    """RegNet bottleneck, channels last; norms over the channels of one position, so images do not mix as in a batch norm."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        squeezed = max(1, width_in // 4)
        self.reduce, self.reduce_norm = nn.Linear(width_in, width, bias=False), nn.LayerNorm(width)
        self.conv, self.conv_norm = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.LayerNorm(width)
        self.gate = nn.Sequential(nn.Linear(width, squeezed), nn.SiLU(), nn.Linear(squeezed, width), nn.Sigmoid())
        self.expand, self.expand_norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width)
        same = width_in == width
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Linear(width_in, width, bias=False), nn.LayerNorm(width))

    def forward(self, features_NRCH: torch.Tensor) -> torch.Tensor:
        """Mix each position with its eight neighbours and its image's mean: float[N, R, C, H]."""
        x_NRCH = F.silu(self.reduce_norm(self.reduce(features_NRCH)))
        x_NRCH = self.conv(x_NRCH.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # a view: torch calls this memory layout channels_last
        x_NRCH = F.silu(self.conv_norm(x_NRCH))
        x_NRCH = x_NRCH * self.gate(x_NRCH.mean((1, 2), keepdim=True))
        return F.silu(self.expand_norm(self.expand(x_NRCH)) + self.shortcut(features_NRCH))


def unshuffle_weights(block_pool: Mapping[str, torch.Tensor], *, pool: int) -> dict[str, torch.Tensor]:
    """Write the weights of a `BlockPoolMLP` as those of the `UnshuffleMLP` (factor = pool, no norm) that computes the same.

    A mean before a linear layer is that layer on the patches side by side: W' = [W, W, ...] / pool ** 2. Exact where pool is a power of
    two; else each weight rounds once in its own type.

    Args:
        block_pool: `state_dict()` of the projector: linear_1 and linear_2.
        pool: side of a block in patches.
    """
    return {**block_pool, "linear_1.weight": block_pool["linear_1.weight"].repeat(1, pool**2) / pool**2}


def _adaptive_pool(features_NRCH: torch.Tensor, visual_grid: int) -> torch.Tensor:
    """Average to visual_grid x visual_grid windows, which overlap where they do not divide; nothing to do at that very grid.

    Its backward (a trained tower, or blocks before it) is one of torch's non-deterministic CUDA operations: see
    torch.use_deterministic_algorithms.
    """
    if tuple(features_NRCH.shape[1:3]) == (visual_grid, visual_grid):
        return features_NRCH
    return F.adaptive_avg_pool2d(features_NRCH.permute(0, 3, 1, 2), visual_grid).permute(0, 2, 3, 1)


def _block_tokens(grid: Grid, option: str, side: int) -> int:
    if grid[0] % side or grid[1] % side:
        common = gcd(*grid)
        *rest, last = [str(n) for n in range(1, common + 1) if common % n == 0]
        fitting = f"{', '.join(rest)} or {last}" if rest else last
        raise UserError(
            f"a {grid[0]} x {grid[1]} grid does not divide by {option} {side}: use {option} {fitting} or the adaptive AveragePoolMLP"
        )
    return grid[0] // side * (grid[1] // side)


def _blocks(features_NRCD: torch.Tensor, side: int) -> torch.Tensor:
    """View as side x side blocks: float[N, R / side, side, C / side, side, D]."""
    return features_NRCD.unflatten(2, (-1, side)).unflatten(1, (-1, side))


def _check_positive(**options: int) -> None:
    if wrong := [f"{name}={value}" for name, value in options.items() if value < 1]:
        raise UserError(f"{', '.join(wrong)}: expected a whole number of at least 1")
