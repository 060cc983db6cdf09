"""What training would be fed, without training: a command line's stages with their data. No weight is asked for and nothing is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from infimed import cli
from infimed.config import Stage, stages
from infimed.contracts import UserError
from infimed.data.datamodule import ShardDataModule
from infimed.data.forecast import Setup
from infimed.data.packing import Price
from infimed.data.picture import View, lay_out
from infimed.data.survey import Evidence, Survey, learned_share, pick, survey
from infimed.processing.flops import ModelShape, prices, shape_of
from infimed.training.run import accumulation

_READ_ONLY = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
_PICTURED = 20_000  # samples whose pictures' sizes are looked up, about
_RENDERED = 64  # samples of a source whose text is read, to see how much of it is learned from


def run(task: Callable[[list[Stage]], object], overrides: Sequence[str]) -> None:
    """Compose the page of training with `overrides` and hand its stages to `task`; a user's mistake ends as in training, with exit 2."""

    def begin(config: DictConfig) -> None:
        with open_dict(config):  # something that is there: a view starts from no weights, so none have to be
            config.init_from, config.resume_from = os.curdir, None
        try:
            task(stages(config))
            sys.stdout.flush()
        except BrokenPipeError:  # `| head`, or a pager that was left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    sys.argv[1:] = [*overrides, *_READ_ONLY]  # where Hydra looks
    cli.main(begin, "train")


def write(page: str, path: Path) -> None:
    """Write a page. Raises: UserError."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: {error.strerror}; name a file in a folder that is there and can be written") from None


def chosen(chain: Sequence[Stage], name: str | None) -> Stage:
    """Return the stage of that name, the first one for None. Raises: UserError."""
    names = [stage.name for stage in chain]
    if name is not None and name not in names:
        raise UserError(f"--stage {name}: expected one of {', '.join(names)}")
    return chain[names.index(name) if name is not None else 0]


@dataclass(frozen=True)
class _Trainer:
    """What the data module asks of its trainer."""

    max_steps: int  # optimizer steps; -1: no limit
    accumulate_grad_batches: int
    distributed_sampler_kwargs: Mapping[str, int]
    max_epochs: int = 1


def open_data(stage: Stage, *, rank: int = 0, world_size: int = 1) -> ShardDataModule:
    """Open the data of a stage as training would on that rank: same plan, same dealing; a fault is shown and not written down.

    Packs are dealt to ranks by modelled cost, as training begins; a run that calibrates its costs on the way deals otherwise from then on.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"--rank {rank} --world-size {world_size}: expected a rank from 0 to the world size less one")
    packs = stage.data["packs_per_batch"]
    steps = accumulation(global_batch=stage.global_batch, packs_per_batch=packs, world_size=world_size)
    data: ShardDataModule = instantiate({**stage.data, "num_workers": 0, "quarantine_path": None})
    limit = -1 if stage.max_steps is None else stage.max_steps
    data.trainer = _Trainer(limit, steps, {"rank": rank, "num_replicas": world_size})
    data.setup()
    if (shape := shape_of_stage(stage)) is not None:
        data.reprice(Price(**prices(shape, trained=stage.system["trainable"])))
    return data


def shape_of_stage(stage: Stage) -> ModelShape | None:
    """Read the model's sizes off the configuration; None where it does not tell them all, or where adapters change what is learned."""
    if stage.adapters:
        return None
    language = stage.model["language"]
    if "folder" in language:
        from transformers import AutoConfig

        with suppress(OSError, ValueError):  # no such folder, or an unknown kind: not counted
            language = {**AutoConfig.from_pretrained(language["folder"], local_files_only=True).to_dict(), **language}
    with suppress(UserError):
        return shape_of({**stage.model, "language": language})
    return None


def view(data: ShardDataModule, *, step: int, title: str) -> View:
    """Read the batch of micro-step `step` and name what is in it. Raises: UserError when the plan ends before."""
    batch = data.first_batch(step=step)
    ahead = next(islice(data.plan.copy(), step, None))
    hand = ahead.hands[data.trainer.distributed_sampler_kwargs["rank"]]
    return lay_out(batch, hand, data.shards.rows, resolution=data.resolution, tokenizer=data.tokenizer, title=title)


def survey_stage(stage: Stage, *, world_size: int = 1) -> Survey:
    """Report what a stage would be fed. Raises: UserError."""
    data = open_data(stage, world_size=world_size)
    setup = Setup(
        name=stage.name,
        max_tokens=data.max_tokens,
        epochs=data.epochs,
        max_steps=stage.max_steps,
        global_batch=stage.global_batch,
        packs_per_batch=data.packs_per_batch,
        world_size=world_size,
        mixing=data.mixing,
        seed=data.seed,
        buffer=data.buffer,
        open_shards=data.open_shards,
        packing=data.packing,
        on_overflow=data.on_overflow,
    )
    shards, catalogue = data.shards, data.plan.catalogue
    rows = pick(catalogue)
    every = -(-sum(map(len, rows.values())) // _PICTURED)
    sizes = [size for numbers in rows.values() for row in numbers[::every].tolist() for size in shards.rows[row].image_sizes]
    few = {source: numbers[:: -(-len(numbers) // _RENDERED)].tolist() for source, numbers in rows.items()}
    learned = {source: learned_share(shards.read_many(numbers), data.tokenizer) for source, numbers in few.items()}
    evidence = Evidence(rows, np.array(sizes, dtype=np.int64).reshape(-1, 2), learned)
    return survey(setup, catalogue, evidence, shape=shape_of_stage(stage), trained=stage.system["trainable"])
