"""Export: `python -m infimed.export ckpt=PATH out=FOLDER`. A stock transformers model, with the proof that it is the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
import torch
from omegaconf import DictConfig

from infimed import cli
from infimed.contracts import UserError
from infimed.evaluate import load_model
from infimed.models import parity
from infimed.models.card import model_card
from infimed.models.checkpoints import read_state, write_safetensors
from infimed.models.shells import Shell, chat_template, choose, generation_config, tokenizer_config
from infimed.models.vlm import InfiMed
from infimed.processing.tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main(config: DictConfig) -> Path:
    """Write the checkpoint that `ckpt` names to `out`, load it again as a stock user does, compare; all or nothing."""
    check(config)
    cli.use_threads(config)
    out, part = Path(config.out), Path(f"{config.out}.part")
    _, stage = read_state(config.ckpt)
    model, tokenizer, digest = load_model(config.ckpt)
    shell, dtype, resolution = choose(model, shell=config.shell), DTYPES[config.dtype], model.resolution
    print(f"{shell.architecture} <- {resolution.describe()}", flush=True)
    parity.cast(model, dtype)
    parity.cast(model, torch.float32)
    shutil.rmtree(part, ignore_errors=True)
    try:
        write(model, tokenizer, shell, stage=stage, folder=part, dtype=dtype)
        answers = parity.answer(model, tokenizer)
        del model  # one model at a time in memory
        proof = {"shell": shell.name, "checkpoint": digest, "weights": config.dtype, **parity.prove(part, answers, resolution)}
        (part / "parity.json").write_text(json.dumps(proof, indent=1) + "\n")
        (part / "README.md").write_text(model_card(stage, proof, resolution=resolution, name=out.name))
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{out}: the same model as {config.ckpt} in {len(proof['cases'])} cases, in float32 and bfloat16 (parity.json)")
    return out


def check(config: DictConfig) -> None:
    """Refuse what cannot be before anything is loaded. Raises: UserError with everything that is wrong."""
    problems = []
    if config.ckpt is None:
        problems.append("ckpt is not set: name a checkpoint, e.g. ckpt=logs/quickstart/latest")
    if config.out is None:
        problems.append("out is not set: name a new folder, e.g. out=exports/infimed")
    elif Path(config.out).exists() and not (Path(config.out).is_dir() and not any(Path(config.out).iterdir())):
        problems.append(f"out={config.out} exists and is not an empty folder: name another, or remove it")
    if config.dtype not in DTYPES:
        problems.append(f"dtype={config.dtype}: expected {' or '.join(DTYPES)}")
    if problems:
        raise UserError("\n".join(f"- {problem}" for problem in problems))


def write(model: InfiMed, tokenizer: Tokenizer, shell: Shell, *, stage: dict, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, configurations, tokenizer, chat template, and the pictures that the proof is made with.

    Raises:
        UserError: a converted weight cannot be held in `dtype`, or the disk is full.
    """
    weights = shell.weights(model)
    if inexact := [key for key, value in weights.items() if not torch.equal(value.to(dtype).to(value.dtype), value)]:
        raise UserError(f"{dtype} cannot hold these converted weights exactly: {', '.join(inexact)}; use dtype=float32")
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder, weights, dtype=dtype)
    described = shell.config(model)
    described.dtype = dtype
    described.save_pretrained(folder)
    for name, content in (
        ("generation_config", generation_config(tokenizer)),
        ("tokenizer_config", tokenizer_config(tokenizer, model)),
        ("preprocessor_config", shell.preprocessor(model)),
        ("processor_config", shell.processor(model)),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(chat_template(shell))
    file = Path(stage["tokenizer"])
    backend = tokenizers.Tokenizer.from_file(str(file / "tokenizer.json" if file.is_dir() else file))
    Tokenizer(backend, fingerprint=tokenizer.fingerprint)  # adds the image tokens
    backend.save(str(folder / "tokenizer.json"))
    parity.save_pictures(folder)


if __name__ == "__main__":
    cli.main(main, "export")
