"""The model card of a quantized model, and the hook by which push_to_hub takes it along (upload.py pushes folders).

transformers writes an automatic, nearly empty card when it pushes a model whose repository has none. Ours takes its place:
what the model is, its sizes as the file has them, how to load it, what to expect. A card that a person wrote keeps its
text, and only metadata it lacks is added. No path of this machine goes into a card: a base model is named by its Hub id.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from tabulate import tabulate

from ..config import LittleBitConfig
from ..initialize.factorize import INITIALISERS
from ..internals.transformers import plain_upload
from ..load.foreign.layouts import LAYOUTS
from ..load.form import is_hub_id
from ..load.replacement import weight_variant
from ..load.save_id import read_id
from ..load.source import find_source, quantization_of
from .size import size_report
from .size_report import SizeReport, format_bytes

__all__ = ["CARD", "evaluation_of", "merge", "model_card", "upload_with_card", "write_card"]

logger = logging.getLogger("hf_littlebit")
CARD = "README.md"
PAPER = "https://huggingface.co/papers/2506.13771"
TAGS = ("littlebit", "quantized", "sub-1-bit", "binary")
AUTOMATIC = "has been automatically generated"  # in the card that transformers writes
SLOT = "[More Information Needed]"  # in huggingface_hub's template, wherever nothing was filled in
BAR = re.compile(r"(?<!\\)\|")  # of a table, and not in a cell
MARK = re.compile(r"<!-- written by hf-littlebit, (\w+) -->")
# Ending of the architecture's name -> task on the Hub, where it follows.
TASKS = {
    "ForCausalLM": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}


def model_card(
    source: Any,
    repo_id: str | None = None,
    evaluation: Mapping[str, float | str] | None = None,
    report: SizeReport | None = None,
) -> ModelCard:
    """The card of a quantized model.

    Args:
        source: the model, or the folder or Hub id that it is saved in.
        repo_id: where it will be found, for the example.
        evaluation: what was measured -> the figure, e.g. {"WikiText-2 perplexity": 12.1}; no figures without it.
        report: the model's size report, if it is at hand.

    Raises:
        ValueError: if the model is not quantized, or its file does not fit its config.
    """
    if isinstance(source, str | os.PathLike):
        source = find_source(source)
    config = quantization_of(source.config)
    if config is None:
        raise ValueError("the model is dense; a LittleBit model card describes a quantized one")
    report = report or size_report(source)
    data = ModelCardData(
        library_name="transformers",
        tags=list(TAGS),
        base_model=_base_model(config),
        base_model_relation="quantized" if _base_model(config) else None,
        pipeline_tag=_task(report.architecture),
    )
    variant = getattr(source, "variant", None)
    body = _body(report, config, repo_id, evaluation, variant)
    # So that a later push can tell our text, whose figures it renews, from one that was edited.
    mark = f"<!-- written by hf-littlebit, {_checksum(body)} -->"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n{mark}\n")


def merge(card: ModelCard | None, ours: ModelCard) -> ModelCard:
    """The card to publish: `card`'s metadata completed by `ours`, with its text, or with ours if nobody wrote it."""
    if card is None:
        return ours
    own: Any = card.data
    metadata = ours.data.to_dict()
    tags = [own.tags] if isinstance(own.tags, str) else list(own.tags or ())
    own.tags = tags + [tag for tag in metadata.pop("tags") if tag not in tags]
    relation = metadata.pop("base_model_relation", None)
    for key, value in metadata.items():
        if not own.get(key):
            setattr(own, key, value)
    if relation and own.get("base_model") == metadata["base_model"] and not own.get("base_model_relation"):
        own.base_model_relation = relation
    if _is_automatic(card.text):
        card.text = ours.text
    return card


def write_card(folder: str, evaluation: Mapping[str, float | str] | None = None, former: str | None = None) -> None:
    """Write the card of the model saved in `folder` as its README.md, or complete the one that a person wrote.

    Args:
        evaluation: as of `model_card`.
        former: the folder whose place `folder` will take, where that card is; by default `folder` itself.

    One that cannot be read stays as it is, with a warning.

    Raises:
        ValueError: as of `model_card`.
    """
    own = os.path.join(former or folder, CARD)
    ours = model_card(folder, evaluation=evaluation)
    try:
        card = merge(ModelCard.load(own) if os.path.isfile(own) else None, ours)
    except Exception as error:  # whatever YAML, UTF-8 and huggingface_hub make of what a person wrote
        logger.warning("%s stays as it is: it cannot be read as a model card (%s)", own, " ".join(str(error).split()))
        return
    card.save(os.path.join(folder, CARD))


def evaluation_of(card: ModelCard | None) -> dict[str, float | str] | None:
    """The figures in a card that this package wrote and nobody changed, so that a renewed one keeps them; None without any."""
    if card is None or not MARK.search(card.text) or not _is_automatic(card.text):
        return None
    _, found, rest = card.text.partition("\n## Evaluation\n")
    rows = [BAR.split(line.strip("|")) for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    figures: dict[str, float | str] = {
        row[0].strip().replace("\\|", "|"): row[1].strip() for row in rows[2:] if len(row) == 2
    }
    return figures or None if found else None


def _is_automatic(text: str) -> bool:
    """True for text that no person wrote: none, transformers' template without a slot filled, or ours unchanged."""
    if not text.strip():
        return True
    written = MARK.search(text)
    if written:
        return written[1] == _checksum(MARK.sub("", text))
    template = ModelCard.from_template(ModelCardData(), model_description="given").text
    return AUTOMATIC in text and text.count(SLOT) >= template.count(SLOT)


def _checksum(text: str) -> str:
    return f"{zlib.crc32(' '.join(text.split()).encode()):08x}"


def upload_with_card(model: Any, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """transformers' `_upload_modified_files`, after README.md in `working_dir` was replaced by our card or completed.

    The package gives it to the quantizer, and the quantizer to its models, so that `push_to_hub` and
    `save_pretrained(push_to_hub=True)` come by here.
    """
    folder = os.fspath(working_dir)
    path = os.path.join(folder, CARD)
    # Of the present save alone: adapters or other variants may lie beside it.
    files = [os.path.join(folder, file) for file in sorted(os.listdir(folder)) if weight_variant(file) is not None]
    files = [file for file in files if file.endswith(".safetensors")]
    present = getattr(quantization_of(model.config), "save_id", None)
    size = sum(os.path.getsize(file) for file in files if present in (None, read_id(file)))
    ours = model_card(model, repo_id, report=replace(size_report(model), file_bytes=size or None))
    merge(ModelCard.load(path) if os.path.isfile(path) else None, ours).save(path)
    return plain_upload(model, working_dir, repo_id, *args, **kwargs)


def _base_model(config: LittleBitConfig) -> str | None:
    name = config.base_model
    return name if name and is_hub_id(name) and not os.path.exists(name) else None


def _task(architecture: str) -> str | None:
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)


def _body(
    report: SizeReport,
    config: LittleBitConfig,
    repo_id: str | None,
    evaluation: Mapping[str, float | str] | None,
    variant: str | None,
) -> str:
    base, name = _base_model(config), repo_id or "PATH_OR_REPOSITORY"
    bits = 32 if config.scale_dtype == "float32" else 16
    of = f"of [{base}](https://huggingface.co/{base}) " if base else ""
    title = repo_id.rpartition("/")[2] if repo_id else f"{report.architecture}, {report.bpw:.2g} bits per weight"
    # The name stands in the config, where anybody may write one; the example imports no other than transformers has.
    model_class = report.architecture if hasattr(transformers, report.architecture) else "AutoModel"
    model_class = "AutoModelForCausalLM" if report.architecture.endswith("ForCausalLM") else model_class
    sections = [
        f"# {title}",
        f"A version {of}whose linear layers are products of binary matrices and {bits}-bit scales, "
        f"at {report.bpw:.3g} bits per weight: the layer of [LittleBit]({PAPER}), {_origin(report, config)}. {_rest(report)}",
    ]
    if report.format == "latent":
        sections.append(
            "This is a training checkpoint: it holds the fp32 latents of the binary factors, for quantization-aware "
            "training, and is much larger than the packed model that it becomes."
        )
    sections += [
        "## Size",
        tabulate(_size_rows(report), ["", "this model"], "github", disable_numparse=True),
        "## Use",
        _usage(model_class, name, variant),
        "Without the plugin, transformers refuses this checkpoint with an error about tensor shapes.",
    ]
    if evaluation:
        figures = [
            (what.replace("|", "\\|"), f"{x:.4g}" if isinstance(x, float) else str(x)) for what, x in evaluation.items()
        ]
        sections += ["## Evaluation", tabulate(figures, ["measured", "figure"], "github", disable_numparse=True)]
    original = f"[{base}](https://huggingface.co/{base})" if base else "the original model"
    sections += [
        "## Limits",
        "At so few bits per weight a model loses quality that the initialiser alone does not bring back; how much of it "
        "training regained is for the author to say. Measure this model on your own task before you rely on it. What is "
        f"known about biases and misuse of {original} holds here too, and so do its licence and terms.",
    ]
    return "\n\n".join(sections) + "\n"


def _origin(report: SizeReport, config: LittleBitConfig) -> str:
    """How the factors came about: by which initialiser, or from a checkpoint of which program and by what formula."""
    if config.converted_from is None:
        inits = sorted({INITIALISERS[layer.init].title for layer in report.layers})
        return f"made with hf-littlebit (initialiser: {', '.join(inits)})"
    layout = LAYOUTS.get(config.converted_from)
    if layout is None:
        return "converted with hf-littlebit from a checkpoint of another program"
    return f"converted with hf-littlebit from a {layout.title} checkpoint, in whose names `{layout.formula}`"


def _rest(report: SizeReport) -> str:
    """What became of the embeddings and the output head."""
    if not report.tables:
        return "The embeddings, the output head and the norms are not quantized."
    tables = "; ".join(
        f"{' and '.join(f'`{name}`' for name in table.modules)}: {table.bits} bits" for table in report.tables
    )
    return f"Tables of integers with scales take the place of an embedding or a head ({tables}); what else there is stays dense."


def _size_rows(report: SizeReport) -> list[tuple[str, str]]:
    measured = "file size" if report.file_bytes else "size of all tensors"
    paths = sorted({len(layer.ranks) for layer in report.layers})
    return [
        ("bits per weight asked", f"{report.bpw_asked:g}"),
        ("bits per weight in the file", f"{report.bpw:.4g}"),
        ("bits per weight of the whole model", f"{report.whole_bpw:.4g}"),
        (measured, format_bytes(report.file_bytes or report.total_bytes)),
        ("the original at 16 bits", f"{format_bytes(report.original_bytes)} ({report.ratio:.1f} times larger)"),
        ("quantized layers", f"{len(report.layers)}, {format_bytes(report.quantized_bytes)}"),
        ("paths per layer", " or ".join(map(str, paths))),
        *((f"{table.bits} bits", f"{' and '.join(table.modules)}: {table.described}") for table in report.tables),
        ("not quantized", format_bytes(report.dense_bytes)),
    ]


def _usage(model_class: str, name: str, variant: str | None) -> str:
    which = f", variant={json.dumps(variant)}" if variant else ""
    lines = [
        "```bash",
        "pip install hf-littlebit",
        "```",
        "",
        "```python",
        "import hf_littlebit  # registers the method with transformers",
        f"from transformers import AutoTokenizer, {model_class}",
        "",
        f'model = {model_class}.from_pretrained("{name}"{which})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "```",
    ]
    return "\n".join(lines)
