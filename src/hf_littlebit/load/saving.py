"""How a LittleBit model's `save_pretrained` writes into a folder that holds a model already: all files, or none.

transformers writes config.json first, then the weights, and leaves what it does not overwrite: model.safetensors stays
beside the shards of the next save, and from_pretrained would read it first. So the new files are written into a folder of
their own and moved up when they are complete (replacement.py), and they carry the id of their save (save_id.py).
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from ..config import LittleBitConfig
from ..internals.transformers import has_adapters, plain_save
from ..plan import Plan, plan_model
from ..ranks import RANK_MULTIPLE
from . import save_id
from .replacement import holds_model, refused_writes, replacement
from .tables import table_modules

__all__ = ["save_whole", "stamped"]


def save_whole(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of transformers, with its arguments, which changes nothing in the folder if it fails.

    Only what one process writes is written so: a save by all processes (distributed_checkpoint), and one that uploads what it
    has written (push_to_hub), is left to transformers.

    Raises:
        ValueError: if another process is saving to the folder.
        OSError: with the folder, if the system refuses to write, e.g. because the disk is full.
    """
    given = dict(zip(("is_main_process", "state_dict", "push_to_hub"), args, strict=False)) | kwargs
    by_one = (
        given.get("is_main_process", True) and not given.get("push_to_hub") and not given.get("distributed_checkpoint")
    )
    try:
        if by_one and not has_adapters(model) and holds_model(save_directory):
            with replacement(save_directory, inside=True) as folder:
                plain_save(model, folder, *args, **kwargs)
        else:
            with refused_writes(os.fspath(save_directory)):
                plain_save(model, save_directory, *args, **kwargs)
    finally:
        config = getattr(model.config, "quantization_config", None)
        if isinstance(config, LittleBitConfig):
            config.save_id = None


def _refuse_lost_tables(model: PreTrainedModel) -> None:
    tables = table_modules(model)
    there = {id(table) for table in tables.values()}
    for name, table in tables.items():
        if id(table.holder()) not in there:
            raise ValueError(
                f"{name} reads the table of an embedding that was replaced, which is no part of the model any more and would not "
                "be saved; call model.dequantize() before embeddings are replaced"
            )


def stamped(model: PreTrainedModel, config: LittleBitConfig) -> dict[str, str]:
    """A new save id for `config`, which is about to be saved with `model`, as the files' metadata say it.

    The config then has the ranks of the layers that there are, where shapes do not say them: those of paths that differ, perhaps
    in a layer that was moved, under patterns that a file's order of names reads otherwise.

    A model with adapters saves them alone, and no config.

    Raises:
        ValueError: if a module reads a table that is not in the model any more, and so in no file.
    """
    if has_adapters(model):
        return {}
    _refuse_lost_tables(model)
    weights = plan_model(model, config, stored=model.state_dict().keys()).weights
    if config.ranks or any(len(set(weight.ranks)) > 1 for weight in weights):
        # Other ranks than a config may say are of another program, and alike in all paths of a layer.
        said = [weight for weight in weights if all(rank % RANK_MULTIPLE == 0 for rank in weight.ranks)]
        config.ranks = Plan(said).ranks() or None
    config.save_id = save_id.draw()
    return {save_id.METADATA: config.save_id}
