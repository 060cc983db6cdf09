"""Run a function in several processes that talk through gloo, and never wait for ever."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOAD = ["torch", "lightning.pytorch", "hydra", "transformers.models.qwen3.modeling_qwen3", "torch.utils.tensorboard"]


def run_ranks(job: Callable[..., Any], *, world_size: int, timeout: float = 120, **kwargs: object) -> list[Any]:
    """Call `job(rank, world_size=..., **kwargs)` in each process and return what each gave back.

    A process that fails or hangs fails the caller. job: a function of a module, with plain arguments and a plain result. timeout: seconds.
    """
    context = multiprocessing.get_context("forkserver")  # a clean process with the slow imports done; a fork of this one might hold locks
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_enter, args=(theirs, job, rank, world_size, port, kwargs))
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    deadline = time.monotonic() + timeout
    try:
        results = [_result(pipe, rank, deadline=deadline) for rank, pipe in enumerate(pipes)]
        for process in processes:
            process.join(10)
        return results
    finally:
        for process in processes:
            process.kill()


def _result(pipe: Connection, rank: int, *, deadline: float) -> Any:
    if not wait([pipe], max(0.0, deadline - time.monotonic())):
        raise TimeoutError(f"rank {rank} hangs")
    try:
        kind, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"rank {rank} died") from None
    if kind == "error":
        raise RuntimeError(f"rank {rank} failed:\n{value}")
    return value


def _enter(pipe: Connection, job: Callable[..., Any], rank: int, world_size: int, port: int, kwargs: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        pipe.send(("result", job(rank, world_size=world_size, **kwargs)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
