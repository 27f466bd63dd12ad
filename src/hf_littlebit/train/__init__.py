"""Quantization-aware training with transformers' Trainer: the callback, the teacher's loss, the data and the checkpoints."""
