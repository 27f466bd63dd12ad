"""A teacher on disk: its likeliest tokens for every position of a data set, so that training needs no teacher in memory.

For each position the k likeliest next tokens and their log-probabilities are kept, 4 bytes a pair (6 where the vocabulary
has more than 65,536 tokens). The rest of the probability is one more outcome, "any other token":

    KL = sum_i p_i log(p_i / q_i) + p_rest log(p_rest / q_rest)

a lower bound of the full KL, which it meets where the student spreads the rest as the teacher does.

A folder holds meta.json, keys.npy uint64 [rows], tokens.npy uint16 or int32 [rows, seq, k] and logprobs.npy float16
[rows, seq, k]. A row is found by its tokens, so that shuffling, other batch sizes and resuming need no bookkeeping.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..load.replacement import replacement
from ..placement import input_device

__all__ = ["TopK", "TopKTeacher", "save_topk"]

SMALL_VOCABULARY = 2**16
FLOOR = 1e-7  # of the probability of "any other token", below which fp32 knows nothing of it


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens of each position: tokens int64 [positions, k], logprobs fp32 [positions, k]."""

    tokens: Tensor
    logprobs: Tensor

    def kl(self, part: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """KL [n, 1] of some positions from the student's log-probabilities log_q [n, vocabulary], and the target [n,
        vocabulary] for which softmax - target is the gradient with respect to the student's logits."""
        tokens, log_p = self.tokens[part], self.logprobs[part]
        p, log_q_top = log_p.exp(), log_q.gather(-1, tokens)
        rest_p = (1 - p.sum(-1, keepdim=True)).clamp_min(FLOOR)
        rest_q = (1 - log_q_top.exp().sum(-1, keepdim=True)).clamp_min(FLOOR)
        # Where the teacher rules a token out, its p (log p - log q) is 0, and not 0 times infinity.
        loss = torch.where(p > 0, p * (log_p - log_q_top), 0.0).sum(-1, keepdim=True) + rest_p * (rest_p / rest_q).log()
        target = (log_q.exp() * (rest_p / rest_q)).scatter(-1, tokens, p)
        return loss, target


class TopKTeacher:
    """Reads a folder that `save_topk` wrote; takes a teacher's place in LittleBitCallback.

    Raises:
        ValueError: if the folder is incomplete.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = os.fspath(folder)
        try:
            with open(os.path.join(self.folder, "meta.json"), encoding="utf-8") as file:
                self.meta = json.load(file)
            keys, self._tokens, self._logprobs = (
                np.load(os.path.join(self.folder, f"{name}.npy"), mmap_mode="r")
                for name in ("keys", "tokens", "logprobs")
            )
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{self.folder} holds no complete set of teacher logits ({error}); write it with save_topk"
            ) from error
        self._rows = {int(key): row for row, key in enumerate(keys)}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, logits: Tensor) -> TopK:
        """The teacher's likeliest tokens for a batch [batch, seq], on the device of the student's `logits`.

        Raises:
            ValueError: for another vocabulary, or a row that is not in the folder.
        """
        if logits.shape[-1] != self.meta["vocabulary"]:
            raise ValueError(
                f"{self.folder} is of a teacher with {self.meta['vocabulary']} logits, the model has {logits.shape[-1]}; "
                "both need the same tokenizer and vocabulary size"
            )
        rows = [self._rows.get(key) for key in _keys(input_ids, attention_mask)]
        if None in rows:
            raise ValueError(
                f"row {rows.index(None)} of a training batch is not among the {len(self._rows)} in {self.folder}; "
                "compute teacher logits for the very rows that are trained on, padding included"
            )
        tokens = torch.from_numpy(self._tokens[rows].astype(np.int64)).flatten(0, 1)
        logprobs = torch.from_numpy(self._logprobs[rows].astype(np.float32)).flatten(0, 1)
        return TopK(tokens.to(logits.device), logprobs.to(logits.device))


def save_topk(
    teacher: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    folder: str | os.PathLike[str],
    k: int = 64,
    keep: int | None = None,
) -> TopKTeacher:
    """Run `teacher` over `batches` (input_ids [batch, seq], attention_mask if any; one seq for all) and save its top k.

    Returns the teacher that reads them back. `folder` is made, and its data replaced as a whole if it has any.

    Args:
        keep: after so many batches what there is of them goes to `folder`.parts, which a call for the same teacher and k reads
            after a kill. By default a kill loses all.

    Raises:
        ValueError: for an impossible k, or rows of different lengths.
    """
    folder = os.fspath(folder)
    parts = None if keep is None else _Parts(f"{folder}.parts", keep)
    keys: list[int] = []
    tokens: list[np.ndarray[Any, Any]] = []
    logprobs: list[np.ndarray[Any, Any]] = []
    vocabulary = length = 0
    device = input_device(teacher)
    teacher.eval()
    for batch in tqdm(batches, desc="teacher logits", unit="batch"):
        own = _keys(batch["input_ids"], batch.get("attention_mask"))
        if parts is not None and (known := parts.rows(own)) is not None:
            vocabulary, length = parts.vocabulary, batch["input_ids"].shape[1]
            keys += own
            tokens += [row for row, _ in known]
            logprobs += [row for _, row in known]
            continue
        given = {key: batch[key].to(device) for key in ("input_ids", "attention_mask") if batch.get(key) is not None}
        with torch.no_grad():
            logits = teacher(**given, use_cache=False).logits
        vocabulary, seen = logits.shape[-1], logits.shape[1]
        if not 1 <= k < vocabulary:
            raise ValueError(f"k is {k}; it must be from 1 to {vocabulary - 1}, one less than the vocabulary")
        if length not in (0, seen):
            raise ValueError(f"a row has {seen} tokens and an earlier one {length}; cut or pad all rows to one length")
        length = seen
        for row in logits:  # one row at a time in fp32
            top = row.float().log_softmax(-1).topk(k)
            tokens.append(top.indices.cpu().numpy().astype(np.uint16 if vocabulary <= SMALL_VOCABULARY else np.int32))
            logprobs.append(top.values.cpu().numpy().astype(np.float16))
        keys += own
        if parts is not None:
            parts.add(own, tokens[-len(own) :], logprobs[-len(own) :], vocabulary)
    if not keys:
        raise ValueError("there are no batches to compute teacher logits for")
    with replacement(folder) as new:
        for name, value in (("keys", np.array(keys, np.uint64)), ("tokens", tokens), ("logprobs", logprobs)):
            np.save(os.path.join(new, f"{name}.npy"), np.stack(value) if isinstance(value, list) else value)
        with open(os.path.join(new, "meta.json"), "w", encoding="utf-8") as file:
            json.dump({"vocabulary": vocabulary, "seq": length, "k": k, "rows": len(keys)}, file)
    if parts is not None:
        parts.remove()
    return TopKTeacher(folder)


class _Parts:
    """What a teacher has said so far, in `folder`: a file 0.npz, 1.npz, ... for every `keep` batches, found by the rows' keys."""

    def __init__(self, folder: str, keep: int):
        self.folder, self.keep = folder, keep
        self.vocabulary = 0
        self._known: dict[int, tuple[Any, Any]] = {}
        self._new: list[tuple[int, Any, Any]] = []
        self._batches = self._files = 0
        while os.path.isfile(file := os.path.join(folder, f"{self._files}.npz")):
            with np.load(file) as part:
                self.vocabulary = int(part["vocabulary"])
                self._known |= dict(
                    zip(map(int, part["keys"]), zip(part["tokens"], part["logprobs"], strict=True), strict=True)
                )
            self._files += 1

    def rows(self, keys: list[int]) -> list[tuple[Any, Any]] | None:
        """Tokens and log-probabilities of rows, None unless all of them are there."""
        return [self._known[key] for key in keys] if all(key in self._known for key in keys) else None

    def add(self, keys: list[int], tokens: list[Any], logprobs: list[Any], vocabulary: int) -> None:
        """Keep one batch; a file takes its name when it is complete."""
        self._new += zip(keys, tokens, logprobs, strict=True)
        self._batches += 1
        if self._batches % self.keep:
            return
        own, said, how = zip(*self._new, strict=True)
        os.makedirs(self.folder, exist_ok=True)
        file = os.path.join(self.folder, f"{self._files}.npz")
        with open(file + ".part", "wb") as stream:
            np.savez(stream, vocabulary=vocabulary, keys=np.array(own, np.uint64), tokens=said, logprobs=how)
        os.replace(file + ".part", file)
        self._files += 1
        self._new = []

    def remove(self) -> None:
        """Delete them all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _keys(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """A 64-bit key of each row, which stands for its tokens, and for where its padding is if it has any."""
    keys = []
    for row, ids in enumerate(input_ids.cpu()):
        text = ids.to(torch.int64).numpy().tobytes()
        if attention_mask is not None and not bool(attention_mask[row].all()):
            text += attention_mask[row].cpu().to(torch.uint8).numpy().tobytes()
        keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    return keys
