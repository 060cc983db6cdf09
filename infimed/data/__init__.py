"""Shards, the global plan and the batches made from it."""
