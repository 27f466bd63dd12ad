"""Documents: what the names of text stand for, and their text in parts that can be tokenized at a time.

A tokenizer takes more than a hundred times the memory of what it is given, and of a long text only the beginning may be wanted.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["document_parts", "document_text", "read_texts", "text_files"]

TEXT_FILES = (".txt", ".md", ".rst", ".py", ".json", ".jsonl")
DOCUMENTS, CHARACTERS = 64, 2**20  # tokenized at a time
# Where a long document may be cut, the best place first: behind a line end that stands alone, which is a token of its own to most
# tokenizers, or in front of the blank that most join with the word behind it.
BREAKS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"\S(?= \S)"))
WITHIN = 8192  # characters before the end of a part


def read_texts(names: Sequence[str | os.PathLike[str]], column: str = "text") -> Iterator[str]:
    """The documents that `names` stand for, one after the other.

    A name is a text file (one document), a .json or .jsonl file (one object with `column` a line), a folder (all such files
    in it, in order of their paths), or a dataset on the Hub as org/name[:config][@split], which needs `datasets`.

    Raises:
        ValueError: for a name that is none of these, and files that are not UTF-8.
    """
    for entry in names:
        name = os.fspath(entry)
        files = text_files(name)
        if files is None:
            yield from _read_hub(name, column)
        for file in files or ():
            yield from _read_file(file, column)


def text_files(name: str) -> list[str] | None:
    """The files that `name` stands for in `read_texts`; None for what may be a dataset on the Hub.

    Raises:
        ValueError: if it is neither.
    """
    if os.path.isdir(name):
        files = [os.path.join(folder, file) for folder, _, files in os.walk(name) for file in files]
        found = sorted(file for file in files if file.endswith(TEXT_FILES))
        if not found:
            raise ValueError(f"{name} holds no text files ({', '.join(TEXT_FILES)})")
        return found
    if os.path.exists(name):
        return [name]
    if "/" in name and not name.startswith((".", "/", "~")) and not name.endswith(TEXT_FILES):
        return None
    raise ValueError(f"{name} does not exist; give text files, folders, or a dataset on the Hub such as org/name")


def _read_file(name: str, column: str) -> Iterator[str]:
    """The documents of one file: a text file is one, and of a .json or .jsonl file each line is one."""
    try:
        with open(name, encoding="utf-8") as file:
            if name.endswith((".json", ".jsonl")):
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{name}, line {number} is no JSON object: {error}") from error
                    if not isinstance(row, dict):
                        raise ValueError(f"{name}, line {number} is no JSON object, but {row!r:.60}")
                    yield document_text(row, column, f"{name}, line {number}")
            else:
                yield file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error


def _read_hub(name: str, column: str) -> Iterator[str]:
    """The documents of a dataset on the Hub, streamed, e.g. roneneldan/TinyStories@validation."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{name} is no file here; to read it from the Hub: pip install 'hf-littlebit[train]', which brings datasets"
        ) from None
    path, _, split = name.partition("@")
    path, _, config = path.partition(":")
    for row in load_dataset(path, config or None, split=split or "train", streaming=True):
        yield document_text(row, column)


def document_parts(documents: Iterable[str]) -> Iterator[list[tuple[bool, str]]]:
    """Lists of (whether a document begins, text) that are tokenized at a time: many short documents, or a part of a long one."""
    held: list[tuple[bool, str]] = []
    size = 0
    for document in documents:
        at = 0
        while at == 0 or at < len(document):
            end = _cut(document, at)
            if len(held) == DOCUMENTS or (held and size + end - at > CHARACTERS):
                yield held
                held, size = [], 0
            held.append((at == 0, document[at:end]))
            size += end - at
            at = max(end, 1)
    if held:
        yield held


def _cut(text: str, at: int) -> int:
    """Where a part of `text` that begins `at` ends: at the text's end, or between two tokens of most tokenizers."""
    end = at + CHARACTERS
    if end >= len(text):
        return len(text)
    for place in BREAKS:
        if found := list(place.finditer(text, max(at, end - WITHIN), end)):
            return found[-1].end()
    return end


def document_text(document: str | dict[str, Any], column: str, where: str = "a row of the data") -> str:
    """The text of a document: itself, or what it has in `column`; `where` says in an error which document it is."""
    if isinstance(document, str):
        return document
    if column not in document:
        raise ValueError(f"{where} has no column {column!r}; its columns are {', '.join(document)}")
    if not isinstance(document[column], str):
        raise ValueError(f"{where} has {document[column]!r:.60} in column {column!r}; it must be text")
    return document[column]
