"""Training text: any documents cut into blocks of equal length, or text that the teacher writes itself.

Documents are joined, each after the tokenizer's start or end-of-text token, and the stream is cut into blocks of `length`
tokens; the incomplete last one is dropped. Every token is a label: padding would waste the arithmetic.

Data-free distillation (LLM-QAT, arXiv 2305.17888): the teacher samples its own text, and the student learns on it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..compat import next_logits
from ..initialize.calibration import evaluating
from ..layers.precision import mixed
from ..placement import compute_dtype, input_device
from .cpu_attention import cpu_attention
from .documents import document_parts, document_text
from .resume import model_fingerprint

__all__ = ["TokenBlocks", "is_listed", "sample_blocks", "spread_batches", "text_blocks"]


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Rows of `tokens` [rows, length] (any integer dtype), as the input and the labels of a causal language model."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = self.tokens[row].long()
        return {"input_ids": tokens, "labels": tokens}

    def split(self, held_out: int) -> tuple[TokenBlocks, TokenBlocks]:
        """Cut the blocks in two, (the first ones, the last `held_out`), unshuffled, so that neighbours stay on one side.

        Raises:
            ValueError: if nothing would be left to train on.
        """
        if not 0 < held_out < len(self):
            raise ValueError(f"{held_out} of {len(self)} blocks cannot be held out; give more text or shorter blocks")
        return TokenBlocks(self.tokens[:-held_out]), TokenBlocks(self.tokens[-held_out:])


def is_listed(rows: Any) -> bool:
    """Whether any row of a dataset can be had by its number; torch's streams have a __getitem__ too, which raises."""
    return not isinstance(rows, IterableDataset) and all(hasattr(rows, name) for name in ("__len__", "__getitem__"))


def spread_batches(
    rows: Any, collate: Callable[[list[Any]], Mapping[str, Any]], examples: int, size: int = 1
) -> Iterator[Mapping[str, Any]]:
    """`examples` of a listed dataset, at equal distances, collated `size` at a time: the same ones on every process."""
    count = min(examples, len(rows))
    chosen = [index * len(rows) // count for index in range(count)]
    for at in range(0, len(chosen), size):
        yield collate([rows[index] for index in chosen[at : at + size]])


def text_blocks(
    texts: Iterable[str | dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    column: str = "text",
    max_blocks: int | None = None,
) -> TokenBlocks:
    """Pack documents into blocks of `length` tokens.

    Args:
        texts: documents: strings, or the rows of a Hugging Face dataset, streamed or not, with their text in `column`.
        max_blocks: stop reading after so many.

    Raises:
        ValueError: for a length below 2, rows without the column, or less text than one block.
    """
    if length < 2:
        raise ValueError(f"length is {length}; a block needs at least 2 tokens")
    separator = _separator(tokenizer)
    pieces: list[Tensor] = []
    count = 0
    for parts in document_parts(document_text(document, column) for document in texts):
        tokenized = tokenizer([text for _, text in parts], add_special_tokens=False, verbose=False)
        for (begins, _), ids in zip(parts, tokenized["input_ids"], strict=True):
            if begins and separator is not None and ids[:1] != [separator]:
                ids = [separator, *ids]
            pieces.append(torch.tensor(ids, dtype=torch.int32))
            count += len(ids)
        if max_blocks is not None and count >= max_blocks * length:
            break
    rows = count // length if max_blocks is None else min(count // length, max_blocks)
    if rows == 0:
        raise ValueError(
            f"the text has {count} tokens, fewer than one block of {length}; give more text or less length"
        )
    return TokenBlocks(torch.cat(pieces)[: rows * length].view(rows, length))


def _separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token before each document: start of text, else end of text; None for a tokenizer that has neither."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    assert token is None or isinstance(token, int)
    return token


def sample_blocks(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 16,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TokenBlocks:
    """Text that `teacher` writes: `rows` blocks of `length` tokens, sampled from its own distribution.

    They start with the token that the tokenizer puts in front of every text; where it puts none, with its special tokens in turn
    (start, end of text, padding, unknown), and where there are none with a random one. An end-of-text token does not end a block:
    the teacher goes on with another document, as in packed text.

    Args:
        seed: of the samples; the same seed, batch size, device and teacher give the same text.
        temperature: of the sampling; 1 is the teacher's own distribution.
        cache: folder that keeps the result under a name made of all of this, and is looked into first; it keeps what is
            written so far as well.

    Raises:
        ValueError: for impossible numbers.
    """
    if rows < 1 or length < 2 or batch_size < 1 or not temperature > 0:
        raise ValueError(
            f"rows {rows}, length {length}, batch_size {batch_size}, temperature {temperature}: at least 1 row of 2 tokens, "
            "1 row at a time, and a temperature above 0 are needed"
        )
    starts, known = _starts(teacher, tokenizer), _known(teacher, tokenizer)
    file = None
    if cache is not None:
        key = _fingerprint(teacher, len(tokenizer), starts, rows, length, seed, temperature, batch_size)
        file = os.path.join(os.fspath(cache), f"self-{key}")
        if (whole := _kept(file)) is not None:
            return TokenBlocks(whole)
    device = input_device(teacher)
    tokens = torch.empty(rows, length, dtype=torch.int32)
    with (
        evaluating(teacher),
        torch.no_grad(),
        cpu_attention(teacher),
        _quick(teacher),
        tqdm(total=rows, desc="teacher writes", unit="block", disable=not progress) as bar,
    ):
        for at in range(0, rows, batch_size):
            size = min(batch_size, rows - at)
            part = None if file is None else f"{file}-{at}"
            some = None if part is None else _kept(part)
            if some is None:
                generator = torch.Generator(device).manual_seed(seed * 2**20 + at)
                begun = _first(starts, known, range(at, at + size), generator)
                some = _sample(teacher, begun, length, temperature, generator)
                if part is not None and size < rows:
                    _keep(part, some)
            tokens[at : at + size] = some
            bar.update(size)
    if file is not None:
        _keep(file, tokens)
        for at in range(0, rows, batch_size):
            if os.path.isfile(part := f"{file}-{at}.safetensors"):
                os.remove(part)
    return TokenBlocks(tokens)


def _quick(teacher: PreTrainedModel) -> AbstractContextManager[Any]:
    """On a CPU with bf16 instructions a model in fp16 writes in bf16: 64 rows at a time are 2.7 times as fast."""
    device = input_device(teacher)
    slow = device.type == "cpu" and getattr(teacher, "dtype", None) == torch.float16
    return mixed(device, compute_dtype(device)) if slow else nullcontext()


def _kept(name: str) -> Tensor | None:
    """The tokens that `_keep` wrote; None if it did not."""
    if not os.path.isfile(f"{name}.safetensors"):
        return None
    with safe_open(f"{name}.safetensors", framework="pt") as stored:
        found: Tensor = stored.get_tensor("tokens")
    return found


def _keep(name: str, tokens: Tensor) -> None:
    """Write tokens to `name`.safetensors, which is renamed when complete: an interrupted run leaves no half of a file."""
    os.makedirs(os.path.dirname(name), exist_ok=True)
    save_file({"tokens": tokens}, f"{name}.part")
    os.replace(f"{name}.part", f"{name}.safetensors")


def _first(starts: list[int], known: int, rows: range, generator: torch.Generator) -> Tensor:
    """The first tokens of blocks number `rows` [rows, 1]: in turn all of `starts`, or without any random ones below `known`."""
    if not starts:
        return torch.randint(known, (len(rows), 1), generator=generator, device=generator.device)
    return torch.tensor([[starts[row % len(starts)]] for row in rows], device=generator.device)


def _starts(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a text may follow: the one that the tokenizer puts in front of all, or where it puts none its special ones.

    Which of these stood between documents when the teacher was trained, such a tokenizer does not say: a chat model's start and end
    are often those of a turn, and the former end of text has become its padding or "unknown".
    """
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    known = _known(teacher, tokenizer)
    special = [token for token in dict.fromkeys(named) if isinstance(token, int) and token < known]
    # Some put a token behind a text, not in front.
    first, other = (tokenizer(text, verbose=False)["input_ids"][:1] for text in ("a", "b"))
    return first if first and first == other and first[0] in special else special


def _known(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens both know."""
    embeddings: Any = teacher.get_input_embeddings()
    return int(min(len(tokenizer), embeddings.num_embeddings))


def _sample(
    teacher: PreTrainedModel, tokens: Tensor, length: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Continue `tokens` [rows, 1] to [rows, length], one token at a time with the teacher's cache."""
    past: dict[str, Any] = {}
    while tokens.shape[1] < length:
        logits, past = next_logits(teacher, tokens, past)
        probabilities = (logits.float() / temperature).softmax(-1)
        tokens = torch.cat([tokens, _draw(probabilities, generator)], dim=1)
    return tokens.to("cpu", torch.int32)


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of `probabilities` [rows, vocabulary]: [rows, 1], int64.

    On a CPU from one random number a row. torch.multinomial draws one for every token of the vocabulary, which takes a quarter of
    the time of a small model; elsewhere it is as fast, and a sum over many in parallel need not come out the same again.
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)
    below = probabilities.cumsum(-1)
    if not bool(below[:, -1].isfinite().all()):
        raise ValueError(
            "the teacher's logits are not finite, so that it writes no text; load it in bfloat16 or float32"
        )
    at = torch.rand(len(below), 1, generator=generator) * below[:, -1:]
    # The first token whose sum is above it, which one of probability 0 never is.
    return torch.searchsorted(below, at, right=True).clamp_max_(below.shape[-1] - 1)


def _fingerprint(teacher: PreTrainedModel, tokens: int, starts: list[int], *numbers: float) -> str:
    """A short name of what the text of `sample_blocks` depends on: the teacher, how many `tokens` the tokenizer has and which ones
    blocks start with, and the `numbers` among the arguments."""
    digest = hashlib.blake2b(model_fingerprint(teacher), digest_size=8)
    digest.update(repr((tokens, starts, *numbers)).encode())
    return digest.hexdigest()
