"""What share of the stream every source has, beside what was asked for."""

from __future__ import annotations

from collections import Counter

import lightning

from infimed.contracts import Batch


class Mixture(lightning.Callback):
    """Log the asked and the realised shares: of the samples since the start, and of this rank's tokens since the last line."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._tokens: Counter[str] = Counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Add up; log every `log_every` optimizer steps, where there is more than one source."""
        self._tokens.update(dict(zip(batch.sources, batch.source_tokens, strict=True)))
        if trainer.fit_loop._should_accumulate() or trainer.global_step % pl_module.log_every:
            return
        plan = trainer.datamodule.plan
        asked, shown = plan.asked(), plan.shown()
        tokens, self._tokens = self._tokens, Counter()
        if len(asked) < 2 or not trainer.is_global_zero:
            return
        metrics = {f"mixture/asked_{name}": share for name, share in asked.items()}
        metrics |= {f"mixture/samples_{name}": count / max(1, sum(shown.values())) for name, count in shown.items()}
        metrics |= {f"mixture/tokens_{name}": tokens[name] / max(1, tokens.total()) for name in asked}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
