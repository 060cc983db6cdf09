"""What the processes of `ranks.run_ranks` do: train a tiny model on shards with every trap in them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from PIL import Image
from torch.distributed.fsdp import fully_shard

from infimed.contracts import Message, Sample
from infimed.data.datamodule import ShardDataModule
from infimed.data.shards import write_shards
from infimed.models.language import qwen3
from infimed.models.projector import AveragePoolMLP
from infimed.models.vision import SiglipTower
from infimed.models.vlm import InfiMed
from infimed.processing.resolution import Resolution
from infimed.processing.tokenizer import Tokenizer
from infimed.training.checkpoint import AtomicCheckpointIO
from infimed.training.module import TrainModule
from infimed.training.optim import parameter_groups
from tests.conftest import ROOT
from tests.training.support import Cut, CutAfter, run

TOKENIZER = ROOT / "samples" / "tokenizer"
RESOLUTION = Resolution(patch_size=7, image_size=28, visual_grid=2)
DAMAGED = b"DAMAGED-ON-PURPOSE"


def write_traps(folder: Path, *, count: int, texts: int = 0, damaged: int = 0) -> Path:
    """Write `count` samples: the first `texts` have no image, the last `damaged` an image whose bytes are not those of the index."""

    def samples() -> Iterator[tuple[Sample, list[bytes]]]:
        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (16, 16), (i * 5 % 256, 80, 200)).save(file, "PNG")
            image = i >= texts
            messages = (Message("user", "<image>\nWhat is this?" if image else "Which number is it?"), Message("assistant", f"Number {i}."))
            extra = b"" if i < count - damaged else DAMAGED  # behind the picture's end: nothing but the checksum sees it
            yield (
                Sample(key=f"s{i:03d}", messages=messages, images=("0.png",) if image else (), licence="CC0-1.0", provenance="drawn"),
                [file.getvalue() + extra] if image else [],
            )

    write_shards(samples(), folder / "train", tokenizer=Tokenizer.load(TOKENIZER))
    for tar in (folder / "train").glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(DAMAGED, DAMAGED.lower()))
    return folder


class Seen(lightning.Callback):
    """Note what this rank was fed, and how the steps went."""

    def __init__(self) -> None:
        self.batches: list[dict] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append(
            {
                "step": batch.step,
                "keys": list(batch.keys),
                "images": len(batch.images),
                "tokens": batch.tokens,
                "faults": sum(batch.faults.values()),
            }
        )
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(pl_module.last_loss)


class Sharded(TrainModule):
    """The shipped module with its blocks sharded by FSDP2."""

    def configure_model(self) -> None:
        if not isinstance(next(self.model.language.parameters()), torch.distributed.tensor.DTensor):
            for block in [*self.model.language.model.layers, *self.model.vision.encoder.layers]:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
            self.groups = parameter_groups(self.model, lr=1e-3, component_lr={}, weight_decay=0.1)


def model() -> InfiMed:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tokenizer = Tokenizer.load(TOKENIZER)
    return InfiMed(
        resolution=RESOLUTION,
        vision=SiglipTower(image_size=28, patch_size=7, num_attention_heads=2, **sizes),
        projector=AveragePoolMLP(in_features=32, out_features=32, visual_grid=2),
        language=qwen3(vocab_size=4096, num_attention_heads=4, num_key_value_heads=2, head_dim=8, **sizes),
        image_token_id=tokenizer.image_id,
    )


def fit(
    rank: int,
    *,
    shards: str,
    world_size: int,
    strategy: str,
    accumulate: int = 1,
    save: str | None = None,
    cut: int | None = None,
    resume: str | None = None,
) -> dict:
    """Train one epoch, a sample a row; say what was seen."""
    data = ShardDataModule(train=[shards], tokenizer=TOKENIZER, resolution=RESOLUTION, max_tokens=48, epochs=1, max_fault_rate=1.0)
    seen = Seen()
    saver = [ModelCheckpoint(dirpath=save, filename="last", every_n_train_steps=1, enable_version_counter=False)] if save else []
    if strategy == "ddp":
        ranks, module = DDPStrategy(process_group_backend="gloo"), TrainModule
    else:
        ranks = ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1, process_group_backend="gloo")
        module = Sharded
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=ranks,
        max_epochs=1,
        logger=False,
        callbacks=[seen, *([CutAfter(step=cut)] if cut is not None else []), *saver],
        enable_checkpointing=bool(saver),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
        plugins=[AtomicCheckpointIO()] if strategy == "ddp" else [],
        gradient_clip_val=1.0,
    )
    system = module(model(), total_steps=50, trainable=["vision", "projector", "language"], lr=1e-3, sources=["unknown"])
    system.stored = {"config": {}}
    with suppress(Cut):
        trainer.fit(system, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return {"steps": trainer.global_step, "batches": seen.batches, "losses": seen.losses}


def train(rank: int, *, world_size: int, overrides: list[str], cut: int | None = None) -> None:
    """Run the shipped entry point on this rank; `cut`: fail in the step after this one."""
    try:
        run(overrides)
    except Cut:
        assert cut is not None


class CutWithin(lightning.Callback):
    """Fail in the middle of an optimizer step, after some micro-batches of this process."""

    def __init__(self, *, batches: int) -> None:
        self.left = batches

    def on_train_batch_start(self, trainer, *_) -> None:
        if not self.left:
            raise RuntimeError("in mid step")
        self.left -= 1
