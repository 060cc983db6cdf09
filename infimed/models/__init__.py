"""Plain PyTorch: vision tower -> projector -> language model. Knows no trainer and no config."""
