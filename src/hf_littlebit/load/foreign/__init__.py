"""Checkpoints of other programs whose layers have the structure of ours: read as they are, checked, and made packed models."""
