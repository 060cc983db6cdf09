"""InfiMed: train, evaluate and ship compact medical vision-language models."""

__version__ = "0.1.0"
