"""Evaluate: `python -m infimed.evaluate experiment=NAME ckpt=PATH`. One table with intervals, every prediction kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from infimed import cli
from infimed.config import evaluation_of
from infimed.contracts import UserError
from infimed.evaluation.answer import LocalModel
from infimed.evaluation.baselines import MajorityAnswer
from infimed.evaluation.report import Table, format_terminal, summarise, to_json, to_markdown
from infimed.evaluation.runner import evaluate as ask
from infimed.evaluation.tasks.shard_vqa import ShardVQA, asked_in
from infimed.models.checkpoints import find_checkpoint, read_checkpoint
from infimed.models.vlm import InfiMed
from infimed.models.weights import load_state_of
from infimed.processing.tokenizer import Tokenizer


def main(config: DictConfig) -> float:
    """Score the checkpoint that `ckpt` names; returns the accuracy over all questions."""
    if config.ckpt is None:
        raise UserError("ckpt is not set: name a checkpoint, e.g. ckpt=logs/quickstart/latest")
    cli.use_threads(config)
    table = evaluate(config, ckpt=config.ckpt, folder=Path(config.run_dir))
    return table.rows[0].accuracy.mean


def evaluate(config: DictConfig, *, ckpt: str, folder: Path) -> Table:
    """Ask every question three times: of the model, of the model shown grey pictures, and of the training set's majority."""
    options = evaluation_of(config)
    if options is None:
        raise UserError("evaluation is not set: choose an experiment that has test questions, e.g. experiment=quickstart")
    model, tokenizer, digest = load_model(ckpt, device=cli.best_device())
    task = ShardVQA(options.shards, name="held-out", limit=options.limit, cluster_by=options.cluster_by)
    model_options = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    settings = f"{options.max_new_tokens} tokens"
    answers = ask(task, LocalModel(model, tokenizer, **model_options), out=folder / "model", name=f"model@{digest}/{settings}")
    blind = ask(task, LocalModel(model, tokenizer, blind=True, **model_options), out=folder / "blind", name=f"blind@{digest}/{settings}")
    prior = MajorityAnswer(asked_in(options.train))
    majority = ask(task, prior, out=folder / "majority", name=f"majority of {prior.fingerprint}", progress=False)
    table = summarise(answers, blind, majority)
    (folder / "table.md").write_text(to_markdown(table))
    (folder / "table.json").write_text(to_json(table))
    print(format_terminal(table), f"\npredictions and tables: {folder}", sep="\n")
    return table


def load_model(ckpt: str, *, device: str = "cpu") -> tuple[InfiMed, Tokenizer, str]:
    """Rebuild the model that a checkpoint was made with, from the configuration inside it; returns a digest of its bytes too."""
    path = find_checkpoint(ckpt)
    checkpoint = read_checkpoint(path, mmap=True)
    stage = checkpoint["infimed"].get("config", {})
    if not {"model", "tokenizer"} <= stage.keys():
        raise UserError(f"{path} does not say which model and tokenizer it was trained with; expected a checkpoint of infimed.train")
    refuse_foreign_targets(stage["model"], path)
    tokenizer = Tokenizer.load(stage["tokenizer"])
    trained_with = checkpoint["infimed"].get("tokenizer")
    if trained_with != tokenizer.fingerprint:
        raise UserError(
            f"{path} was trained with another tokenizer or chat template ({trained_with}) than {stage['tokenizer']} now holds "
            f"({tokenizer.fingerprint}): put the old one back, or train again"
        )
    model = instantiate(stage["model"], image_token_id=tokenizer.image_id)
    load_state_of(model, checkpoint, origin=str(path))
    with path.open("rb") as file:
        return model.to(device).eval(), tokenizer, hashlib.file_digest(file, "sha256").hexdigest()[:12]


PROJECTORS = ("AveragePoolMLP", "BlockPoolMLP", "UnshuffleMLP", "PerceiverResampler", "CAbstractor")
BUILT_FROM_A_CHECKPOINT = {
    "infimed.models.vlm.InfiMed",
    "infimed.processing.resolution.Resolution",
    "infimed.models.vision.SiglipTower",
    "infimed.models.vision.NaflexTower",
    *(f"infimed.models.projector.{name}" for name in PROJECTORS),
    "infimed.models.language.qwen3",
    "infimed.models.language.causal_lm",
}


def refuse_foreign_targets(node: object, path: Path) -> None:
    """Let a checkpoint choose among the model's own classes only: what it names is called with what it says."""
    if isinstance(node, dict) and node.get("_target_", "infimed.models.vlm.InfiMed") not in BUILT_FROM_A_CHECKPOINT:
        raise UserError(f"{path} asks to run {node['_target_']}: only {', '.join(sorted(BUILT_FROM_A_CHECKPOINT))} are built from a file")
    for inside in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        refuse_foreign_targets(inside, path)


if __name__ == "__main__":
    cli.main(main, "evaluate")
