"""Evaluation: questions from shards, answers from a model, verdicts that never guess, intervals that respect clusters."""
