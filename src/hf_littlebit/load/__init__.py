"""How a model becomes a LittleBit model, while `from_pretrained` loads it or in memory, and how a saved one is read and checked."""
