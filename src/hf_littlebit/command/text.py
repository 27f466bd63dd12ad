"""The text that --data names: what is read, what a model writes, or as much of each.

`self` among the names stands for the model. Alone it writes all of the text; beside others it writes as much as they give, so that
the quantized model unlearns less of what the given text is not about. Refinement has it do so unasked where that is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..train.data import TokenBlocks

__all__ = [
    "DATA_HELP",
    "Text",
    "check_names",
    "context_of",
    "head_text",
    "is_mixed",
    "text_length",
    "written_at_a_time",
]

LENGTH = 512  # tokens of the longest block by default
WRITTEN, CACHE = 64, 1e9  # blocks that a model writes at a time at most, and bytes of their keys and values
HEAD_BLOCKS = 1024  # at the beginning of a text, among which those are that a head is rounded for

DATA_HELP = (
    "text files, folders, Hub datasets (org/name[:config][@split]), `self`: the model writes the text; or both: it writes as "
    "much as is given, so that less is unlearnt of what your text is not about"
)


@dataclass(frozen=True)
class Text:
    """What --data and its companions say.

    Attributes:
        names: of files, folders and datasets, and `self`.
        column: of datasets and JSON lines. length: tokens per block.
        writes: blocks that a model writes at a time, which decides what it writes. seed: of that. cache: folder that keeps it.
    """

    names: Sequence[str]
    column: str
    length: int
    seed: int
    cache: str
    writes: int

    @property
    def written(self) -> bool:
        """Whether the model writes all of it."""
        return list(self.names) == ["self"]

    @property
    def mixed(self) -> bool:
        """Whether the model writes a half."""
        return is_mixed(self.names)

    def first(self, model: Any, tokenizer: Any, rows: int | None) -> TokenBlocks:
        """What is read; what `model` writes if that is all. `rows` blocks at most, of what is to come with the other half."""
        from ..train.data import text_blocks
        from ..train.documents import read_texts

        if self.written:
            assert rows is not None
            return self._sample(model, tokenizer, rows)
        names = [name for name in self.names if name != "self"]
        most = rows // 2 if self.mixed and rows is not None else rows
        return text_blocks(read_texts(names, self.column), tokenizer, self.length, self.column, most)

    def whole(self, model: Any, tokenizer: Any, given: TokenBlocks, own: int) -> TokenBlocks:
        """`given` and `own` blocks that `model` writes, shuffled: rows that are chosen from among them at equal distances are of
        both kinds as well."""
        if not own:
            return given
        import torch

        from ..train.data import TokenBlocks

        both = torch.cat([given.tokens, self._sample(model, tokenizer, own).tokens])
        return TokenBlocks(both[torch.randperm(len(both), generator=torch.Generator().manual_seed(0))])

    def _sample(self, model: Any, tokenizer: Any, rows: int) -> TokenBlocks:
        from ..train.data import sample_blocks

        return sample_blocks(
            model, tokenizer, rows, self.length, seed=self.seed, batch_size=self.writes, cache=self.cache
        )


def head_text(names: Sequence[str], column: str, model: Any, tokenizer: Any) -> Any:
    """Batches of the text of `names` for `initialize.head_inputs.head_moment`, of a latent `model` whose head is to have 4 bits.

    Raises:
        ValueError: it has more bits, so that text is of no use; or there is too little text.
    """
    from torch.utils.data import default_collate

    from ..initialize.head_inputs import HEAD_EXAMPLES
    from ..train.data import spread_batches, text_blocks
    from ..train.documents import read_texts

    bits = model.config.quantization_config.head_bits
    if bits != 4:
        raise ValueError(f"--data is what a head of 4 bits is rounded for, and this one has {bits}; leave it out")
    length = text_length(None, model.config)
    blocks = text_blocks(read_texts(names, column), tokenizer, length, column, HEAD_BLOCKS)
    return spread_batches(blocks, default_collate, HEAD_EXAMPLES)


def is_mixed(names: Sequence[str]) -> bool:
    """Whether `self` stands beside others among the names of --data, so that the model writes a half."""
    return "self" in names and len(names) > 1


def check_names(names: Sequence[str]) -> None:
    """Refuse impossible names of --data before anything is loaded.

    Raises:
        ValueError: if `self` is named twice, and for files that there are not.
    """
    from ..train.documents import text_files

    if list(names).count("self") > 1:
        raise ValueError("--data names self twice; once is enough: the model writes as much text as is given")
    for name in names:
        if name != "self":
            text_files(name)


def context_of(config: Any) -> int:
    """Tokens that a model with this `config` reads at once; LENGTH where it does not say, or has no limit (XLNet: -1)."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return int(context) if context > 1 else LENGTH


def text_length(asked: int | None, config: Any) -> int:
    """Tokens per block: as `asked` by --length, or the context of the model with this `config`, at most LENGTH.

    Raises:
        ValueError: if it is no length for this model.
    """
    context = context_of(config)
    length = min(context, LENGTH) if asked is None else asked
    if not 2 <= length <= context:
        raise ValueError(f"--length is {length}; it must be from 2 to the model's context of {context} tokens")
    return int(length)


def written_at_a_time(config: Any, length: int) -> int:
    """Blocks that the model writes at a time: those whose keys and values in 16 bits fit into CACHE, at most WRITTEN.

    By the config alone, because what is written depends on it.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    size = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * size
    each = 4 * (getattr(text, "num_hidden_layers", None) or 0) * keys * length
    return max(1, min(WRITTEN, int(CACHE / max(1, each))))
