"""Plain text generation of a model, made faster on a GPU by recording a decode step once."""
