"""What of a saved model's folder goes to the Hub: the files that transformers' save_pretrained writes, by name, and a card.

Anything else that lies in the folder stays on this machine and is named in a warning: notes, logs, a trainer's state,
pickled arguments with paths of the machine. A link is followed only to a file in the folder itself, or from a snapshot in
the Hub's cache to the blobs of its repository, where all its files are links:

    models--org--name/snapshots/<revision>/config.json  ->  models--org--name/blobs/<hash>
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..load.replacement import weight_variant
from ..load.save_id import check_save
from ..load.source import Source, find_source
from .card import CARD, evaluation_of, merge, model_card
from .size import size_report

__all__ = ["push_folder"]

logger = logging.getLogger("hf_littlebit")
CONFIGS = {
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "audio_tokenizer_config.json",
}
# The vocab_files_names of transformers' tokenizers.
VOCABULARIES = {
    *(
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "spm.model",
    ),
    *("sentencepiece.model", "spm_char.model", "tiktoken.model", "tekken.json", "bpe.codes", "dict.txt", "emoji.json"),
    *("entity_vocab.json", "normalizer.json", "byte_maps.json", "prophetnet.tokenizer", "source.spm", "target.spm"),
    *("target_vocab.json", "vocab-src.json", "vocab-tgt.json", "word_shape.json", "word_pronunciation.json"),
}
# As they are called: in capitals, or the bare word; not a license_key.txt, or LICENSE-secret.
LEGAL = re.compile(
    r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([-_][A-Z0-9][A-Z0-9._-]*)?(\.md|\.txt)?|([Ll]icen[cs]e|[Nn]otice|[Cc]opying)(\.md|\.txt)?"
)
TEMPLATES = "additional_chat_templates"  # a folder of .jinja files, for a tokenizer with several templates
NAMED = 12  # of the files that stay, in the warning


def push_folder(folder: str, repo_id: str, private: bool | None = None, token: Any = None) -> CommitInfo:
    """Upload the packed model saved in `folder`: its weight files, configs, tokenizer and licence, and a card.

    The card is README.md of the folder, else of the repository, else ours, completed as in `merge`. The folder's files
    are checked against its config first, from their headers; no weights are loaded. What is not uploaded is warned about.

    Raises:
        ValueError: if the folder does not hold a complete packed model, if its config or weights are links to files
            elsewhere, or if `repo_id` cannot be one.
        OSError: if the Hub refuses or cannot be reached.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is not a folder; give one that `littlebit quantize` or save_pretrained wrote")
    validate_repo_id(repo_id)
    source = find_source(folder)
    if source.quantization is None or source.quantization.format != "packed":
        what = "a dense model" if source.quantization is None else "a latent model, for training"
        raise ValueError(f"{folder} holds {what}; only packed models are pushed: quantize it first, or save it packed")
    check_save(folder, source.files, alone=True)
    report = size_report(source)
    names, left_out = _choose(folder, source)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    own = ModelCard.load(os.path.join(folder, CARD)) if CARD in names else None
    # The repository's figures are those of the model that it held so far.
    ours = model_card(source, repo_id, evaluation_of(own), report)
    card = merge(own or _repository_card(repo_id, token), ours)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, os.path.join(folder, name)) for name in names if name != CARD
    ]
    operations.append(CommitOperationAdd(CARD, str(card).encode()))
    # Weights of the model before, which from_pretrained would find first, or that are in nobody's index any more.
    variant = source.variant or ""
    former = [name for name in api.list_repo_files(repo_id) if weight_variant(name) == variant and name not in names]
    operations += [CommitOperationDelete(name) for name in former]
    done = api.create_commit(repo_id, operations, commit_message="Upload model quantized with hf-littlebit")
    for reason, kept in left_out.items():
        more = f" and {len(kept) - NAMED} more" if len(kept) > NAMED else ""
        logger.warning("not uploaded, %s: %s%s", reason, ", ".join(kept[:NAMED]), more)
    return done


def _choose(folder: str, source: Source) -> tuple[list[str], dict[str, list[str]]]:
    """(names to upload, reason -> names that stay) of what is in `folder`; of hidden files nothing is said.

    Raises:
        ValueError: if a file that the model cannot do without is a link to elsewhere.
    """
    needed = {"config.json", *map(os.path.basename, [*source.files, *filter(None, [source.index])])}
    chosen: list[str] = []
    no_part: list[str] = []
    outside: list[str] = []
    entries = sorted(name for name in os.listdir(folder) if name[0] != ".")
    if TEMPLATES in entries and os.path.isdir(os.path.join(folder, TEMPLATES)):
        entries.remove(TEMPLATES)
        entries += [f"{TEMPLATES}/{name}" for name in sorted(os.listdir(os.path.join(folder, TEMPLATES)))]
    for name in entries:
        path = os.path.join(folder, name)
        template = name.startswith(f"{TEMPLATES}/") and name.endswith(".jinja")
        known = name in needed or name in CONFIGS or name in VOCABULARIES or name == CARD or template
        if os.path.isdir(path) or not (known or LEGAL.fullmatch(name)):
            no_part.append(name + "/" * os.path.isdir(path))
        elif os.path.isfile(path) and _belongs(path, folder):
            chosen.append(name)
        elif name in needed:
            raise ValueError(f"{path} links to a file outside of its folder; put the file itself there to push it")
        else:
            outside.append(name)
    reasons = {"since it is no file of a saved model": no_part, "since it links out of the folder": outside}
    return chosen, {reason: names for reason, names in reasons.items() if names}


def _belongs(path: str, folder: str) -> bool:
    """True if `path`, with its links followed, is in `folder`, or in the blobs of the repository it is a snapshot of."""
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    snapshot = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    return target.is_relative_to(root) or snapshot


def _repository_card(repo_id: str, token: Any) -> ModelCard | None:
    try:
        return ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        return None
