"""torch.compile, block by block: one compiled decoder block and one tower block serve all layers and every pack."""

from __future__ import annotations

from collections.abc import Callable

import torch

from infimed.models.vlm import InfiMed


def compile_blocks(model: InfiMed, *, backend: str | Callable = "inductor") -> None:
    """Compile the blocks of tower and decoder, and the loss of a chunk of rows, in place; parameters keep their names.

    A whole-model graph would take minutes for no further speed. `fullgraph`: a graph break is an error, not a slow surprise. Shapes that
    vary from pack to pack (slots, patches) become symbolic at their second value, so that nothing is compiled again after warm-up.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # stages and sweep points of one process add up
    for block in (*model.vision.encoder.layers, *model.language.model.layers):
        block.compile(fullgraph=True, backend=backend)
    model.compiled, model.compile_loss = True, backend == "inductor"
