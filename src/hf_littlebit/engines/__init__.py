"""Serving engines other than transformers: what teaches each of them to read and compute a packed checkpoint."""
