"""Train: `python -m infimed.train experiment=NAME [key=value ...]`. One stage, or a chain of them and a score at the end."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from infimed import cli
from infimed.config import Stage, run_folder, stages
from infimed.data.packing import Price
from infimed.evaluate import evaluate
from infimed.models.adapters import add_adapters
from infimed.models.attention import resolve
from infimed.models.compile import compile_blocks
from infimed.models.vlm import InfiMed
from infimed.models.weights import check_vocabulary, load_checkpoint, load_hub_folders
from infimed.processing.flops import prices
from infimed.processing.tokenizer import Tokenizer
from infimed.training import run
from infimed.training.checkpoint import AtomicCheckpointIO

if TYPE_CHECKING:
    from lightning import Trainer


def train(config: DictConfig) -> float:
    """Run every stage that is not finished yet, then the evaluation; returns the last validation loss, for sweepers."""
    chain = stages(config)
    cli.use_threads(config)
    for number, stage in enumerate(chain, 1):
        print(f"\n== stage {number} of {len(chain)}: {stage.name} -> {stage.folder}", flush=True)
        result = fit(stage)
        run.link_latest(run_folder(config), stage.folder)
    if len(chain) > 1:
        run.link(run_folder(config) / "last.ckpt", f"{Path(chain[-1].folder).name}/last.ckpt")
    if config.evaluation and run.is_first_rank():
        evaluate(config, ckpt=f"{chain[-1].folder}/last.ckpt", folder=run_folder(config) / "evaluation")
    return result["train_loss"] if result["val_loss"] is None else result["val_loss"]


def fit(stage: Stage) -> dict[str, float]:
    """Train one stage: weights in, checkpoints and curves out; a finished one is left as it is."""
    trainer = build_trainer(stage)
    device = trainer.strategy.root_device
    resolve(stage.model.get("attention", "auto"), device, torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32)
    resume = run.resume_point(asdict(stage), world_size=trainer.world_size)
    if result := run.finished(stage.folder):
        print(f"already finished ({result['steps']} steps): nothing to do; name another run_dir to train again")
        return result
    run.seed_everything(stage.seed)
    data = instantiate(stage.data)
    data.trainer = trainer  # Lightning would set it in fit; the plan needs the ranks and the limit before
    if resume is not None:
        data.load_state_dict(run.data_position(resume))
    batches = len(data.train_dataloader())
    total_steps = math.ceil(batches / trainer.accumulate_grad_batches)
    model = instantiate(stage.model, image_token_id=data.tokenizer.image_id)
    if resume is None:
        load_weights(model, stage, data.tokenizer)
    add_adapters(model, stage.adapters or {})
    system = instantiate(stage.system, model=model, total_steps=total_steps, sources=data.sources)
    # set here: Hydra would build what it names if it were an argument
    system.stored = {"config": asdict(stage), "tokenizer": data.tokenizer.fingerprint}
    print(system.describe(), model.resolution.describe(), data.describe(), sep="\n")
    print(run.cost(system, stage.model, data.first_batch(), batches=batches * trainer.world_size), flush=True)
    if system.shape is not None:  # ranks share rows by what they cost; a resumed run goes on with the prices it was saved with
        data.reprice(Price(**prices(system.shape, trained=system.trainable)))
    if stage.compile == "yes" or (stage.compile == "auto" and device.type == "cuda"):
        compile_blocks(model)
    trainer.fit(system, datamodule=data, ckpt_path=resume, weights_only=True)
    if stage.data["val"] and "val/loss" not in trainer.callback_metrics:  # killed between the last step and its validation
        trainer.validate(system, datamodule=data, verbose=False)
    return run.mark_finished(stage.folder, trainer, system)


def build_trainer(stage: Stage) -> Trainer:
    """Build the trainer with its callbacks and loggers, accumulating up to the global batch."""
    precision = run.precision(stage.trainer["precision"], stage.trainer["accelerator"])
    half = [run.HalfWeights(precision)] if precision == "bf16-true" else []
    trainer = instantiate(
        stage.trainer,
        max_steps=-1 if stage.max_steps is None else stage.max_steps,
        precision=None if half else precision,
        callbacks=[instantiate(node) for node in stage.callbacks.values()],
        logger=[instantiate(node) for node in stage.logger.values()],
        plugins=[AtomicCheckpointIO(), *half],
    )
    trainer.accumulate_grad_batches = run.accumulation(
        global_batch=stage.global_batch, packs_per_batch=stage.data["packs_per_batch"], world_size=trainer.world_size
    )
    return trainer


def load_weights(model: InfiMed, stage: Stage, tokenizer: Tokenizer) -> None:
    """Start from the last stage's checkpoint, or from hub folders, or stay at random init."""
    check_vocabulary(model, tokenizer)
    if stage.init_from:
        load_checkpoint(model, stage.init_from)
    elif any(stage.weights.values()):
        load_hub_folders(model, **stage.weights, tokenizer=tokenizer, grow_vocabulary="folder" in stage.model["language"])


if __name__ == "__main__":
    cli.main(train, "train")
