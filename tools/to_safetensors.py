"""Write the weights of a checkpoint as a safetensors folder: no GPU, no model built, one tensor in memory at a time.

python tools/to_safetensors.py logs/pretrain/latest out/ [--dtype bfloat16] [--max-shard-gib 4]

For weights that leave as they are, names and all (`vision.`, `projector.`, `language.`), at any `visual_grid`. A model that stock
transformers loads is what `python -m infimed.export` writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from infimed.contracts import UserError
from infimed.models.adapters import is_adapter
from infimed.models.checkpoints import read_state, write_safetensors


def convert(ckpt: str, out: Path, *, dtype: torch.dtype | None, max_shard_bytes: int) -> int:
    """Write the folder and return the number of tensors. Raises: UserError."""
    state, _ = read_state(ckpt)
    if any(map(is_adapter, state)):
        raise UserError(f"{ckpt} holds adapters beside the weights: `python -m infimed.export` merges them")
    write_safetensors(out, state, dtype=dtype, max_shard_bytes=max_shard_bytes)
    return len(state)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="a .ckpt file or a run folder")
    parser.add_argument("out", type=Path, help="a folder without weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of floating-point tensors; default: as they are")
    parser.add_argument("--max-shard-gib", type=float, default=4.0, help="of one file")
    args = parser.parse_args(arguments)
    try:
        limit = int(args.max_shard_gib * 2**30)
        if limit < 1:
            raise UserError(f"--max-shard-gib {args.max_shard_gib}: expected a positive number")
        count = convert(args.ckpt, args.out, dtype=getattr(torch, args.dtype) if args.dtype else None, max_shard_bytes=limit)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
