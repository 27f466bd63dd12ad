"""Saved models: what a packed checkpoint must hold, checked from the files' headers before anything is loaded.

transformers fills tensors that a checkpoint lacks with random numbers and warns. For a quantized model that is never what
was meant, so names, shapes and dtypes are compared first, and every difference is an error that says where it is.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.modeling_utils import str_to_torch_dtype

from ..config import LittleBitConfig
from ..internals.transformers import may_be_missing, tied_weights
from ..layers.linear import FactorModule
from ..module_names import aliases
from ..plan import Plan
from .conversion import part_shapes
from .meta_model import saved_class, saved_names

__all__ = [
    "Header",
    "read_headers",
    "refuse_missing",
    "refuse_quantized",
    "refuse_special",
    "regular_file",
    "required",
    "verify",
    "verify_dense",
]

Header = dict[str, tuple[str, tuple[int, ...], str]]  # tensor -> (safetensors dtype, shape, file name)
# transformers' own table, e.g. "BF16" -> torch.bfloat16.
INTEGERS = {name for name, dtype in str_to_torch_dtype.items() if not dtype.is_floating_point}
NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}


def read_headers(files: Sequence[str]) -> Header:
    """Names, dtypes and shapes of all tensors in some safetensors files, without their data.

    Raises:
        ValueError: for a missing, damaged or foreign file, with its name.
    """
    header: Header = {}
    for file in files:
        name = os.path.basename(file)
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{name} is no safetensors file; quantized models are stored in safetensors only")
        refuse_special(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (no dict: it has no iterator)
                    part = tensors.get_slice(key)
                    header[key] = (part.get_dtype(), tuple(part.get_shape()), name)
        except FileNotFoundError:
            raise ValueError(f"{file} is missing; download or save the checkpoint again") from None
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise ValueError(f"{name} is damaged: {error}; download or save the checkpoint again") from error
    return header


def regular_file(path: str) -> os.stat_result:
    """What the file system says of a file, which must be a regular one; a link may lead to one, as in the Hub's cache.

    Raises:
        ValueError: for a pipe, a socket or a device, which reading could wait for without end, a folder, or a link to nothing.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); download the checkpoint again") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(
            f"{path} is no regular file but a folder, a pipe, a socket or a device; put the file itself there"
        )
    return found


def refuse_special(path: str) -> None:
    """`regular_file`, unless there is nothing at `path`, or a folder: whoever reads that has words of its own."""
    if os.path.exists(path) and not os.path.isdir(path):
        regular_file(path)


def verify(
    model: PreTrainedModel,
    plan: Plan,
    config: LittleBitConfig,
    header: Header,
    tables: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
) -> None:
    """Compare the `header` of a checkpoint with the quantized `model` (on meta) that it is to be loaded into.

    Args:
        tables: {name: (shape, dtype)} of the parts of packed embeddings and heads, which are in their places in `model`.

    Raises:
        ValueError: if a tensor is missing, or has another dtype than the config implies or another shape than the ranks of its
            layer imply, which the plan has from the file itself.
    """
    prefix = model.base_model_prefix
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    ranks: dict[str, tuple[int, ...]] = {}
    for weight in plan.weights:
        shapes = part_shapes(weight, config)
        expected.update(shapes)
        ranks.update(dict.fromkeys(shapes, weight.ranks))
    for name, (shape, dtype) in expected.items():
        entry = _find(header, name, prefix)
        # DeepSpeed saves latents in the 16 bits that it computes in.
        allowed = {NAMES[dtype], "BF16", "F16"} if dtype == torch.float32 else {NAMES[dtype]}
        if entry is not None and (entry[0] not in allowed or entry[1] != shape):
            raise ValueError(
                f"{name} is {entry[0]} {list(entry[1])} in {entry[2]}, but a layer of ranks {list(ranks[name])} in the format "
                f"{config.format!r} implies {NAMES[dtype]} {list(shape)}; the file is damaged or its config.json was changed"
            )
    for name, (shape, dtype) in (tables or {}).items():
        entry = _find(header, name, prefix)
        if entry is not None and (entry[0] != NAMES[dtype] or entry[1] != shape):
            raise ValueError(
                f"{name} is {entry[0]} {list(entry[1])} in {entry[2]}, but the config's embedding_bits ({config.embedding_bits}) "
                f"and head_bits ({config.head_bits}) imply {NAMES[dtype]} {list(shape)}; the file is damaged or its config.json "
                "was changed"
            )
    for name, parameter in model.named_parameters():
        entry = None if name in expected else _find(header, name, prefix)
        if entry is not None and parameter.is_floating_point() and entry[0] in INTEGERS:
            raise ValueError(
                f"{name} is packed ({entry[0]} {list(entry[1])}) in {entry[2]}, but the parts that belong to it are missing; "
                "the checkpoint is incomplete: download or save it again"
            )
    is_held = _is_held(model, header)
    needed = (*expected, *(tables or ()), *required(model, expected))
    lacking = [name for name in dict.fromkeys(needed) if not is_held(name)]
    if lacking:
        files = sorted({entry[2] for entry in header.values()})
        raise ValueError(_missing_message(lacking, files[0] if len(files) == 1 else f"{len(files)} files", model))


def required(model: PreTrainedModel, parts: Collection[str]) -> list[str]:
    """Names of the dense tensors that a checkpoint must hold for `model`, whose LittleBit layers have `parts` beside them.

    These are all of them, if the checkpoint was saved from the model's own class. If it was saved from another class, what
    only this class has is new, e.g. a task's head. If the config does not say from which class, the base model and the output
    embeddings are required.
    """
    prefix = model.base_model_prefix
    known = set(parts) | set(tied_weights(model))
    ignored = [re.compile(pattern) for pattern in may_be_missing(model)]
    names = [name for name in model.state_dict() if name not in known and not any(p.search(name) for p in ignored)]
    if saved_class(model.config) is None and hasattr(model, prefix):
        head = model.get_output_embeddings()
        outputs = {f"{name}.{part}" for name, m in model.named_modules() if m is head for part in m.state_dict()}
        return [name for name in names if name.startswith(f"{prefix}.") or name in outputs]
    saved = saved_names(model)
    return (
        names if saved is None else [name for name in names if any(alias in saved for alias in aliases(name, prefix))]
    )


def refuse_missing(model: PreTrainedModel, missing: Iterable[str], planned: Collection[str]) -> None:
    """Refuse a model that transformers is about to complete with random numbers, wherever its tensors came from.

    `verify` and `verify_dense` read the headers of safetensors files. This is asked after loading, when transformers has found
    out what is missing, and so covers state dicts and other files as well.

    Args:
        missing: names of the tensors that were not found.
        planned: names of the parts that are about to be made of dense weights, so that they need not be found.

    Raises:
        ValueError: naming a tensor of `model` that would be random.
    """
    names = set(missing) - set(planned)
    if not names:
        return
    parts = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, FactorModule)
        for part in module.part_dtypes
    }
    is_held = _is_held(model, model.state_dict().keys() - set(missing))
    lacking = sorted(names & parts) or sorted(
        name for name in names.intersection(required(model, parts)) if not is_held(name)
    )
    if lacking:
        raise ValueError(_missing_message(lacking, "the checkpoint", model, dense=bool(planned)))


def verify_dense(model: PreTrainedModel, header: Header, planned: Collection[str]) -> None:
    """Refuse a dense checkpoint that lacks weights, from its `header`, before the first of them is factorized.

    A tensor that `model` does not know by its name may be an older layout's, which transformers turns into what seems to be
    missing (experts that are stored one by one, say). With one of those in the header nothing is refused here.

    Raises:
        ValueError: naming a tensor that is missing.
    """
    prefix = model.base_model_prefix
    names = {alias for name in model.state_dict() for alias in aliases(name, prefix)}
    if not names.issuperset(header):
        return
    is_held = _is_held(model, header)
    lacking = [name for name in required(model, planned) if not is_held(name)]
    if lacking:
        raise ValueError(_missing_message(lacking, "the checkpoint", model, dense=True))


def _is_held(model: PreTrainedModel, names: Collection[str]) -> Callable[[str], bool]:
    """A function that says if a tensor of `model` is among `names`, under its own name or that of a tensor tied to it."""
    prefix = model.base_model_prefix
    tied: dict[str, list[str]] = {}
    for target, source in tied_weights(model).items():
        tied.setdefault(source, []).append(target)
    return lambda name: any(alias in names for same in (name, *tied.get(name, ())) for alias in aliases(same, prefix))


def _missing_message(lacking: Sequence[str], where: str, model: PreTrainedModel, dense: bool = False) -> str:
    remedy = "the checkpoint is incomplete: download or save it again"
    model_class = saved_class(model.config)
    if model_class is not None and not isinstance(model, model_class):
        remedy += f", or load it as the {model_class.__name__} it was saved from"
    if dense:
        remedy += ". If random numbers will do there, save the dense model as transformers loads it, and quantize that"
    return f"{len(lacking)} tensor(s) are missing from {where}, e.g. {lacking[0]}; {remedy}"


def refuse_quantized(header: Header) -> None:
    """Refuse to quantize a checkpoint whose weights are integers or 8-bit floats: another method quantized it already.

    Integer buffers (positions, masks) are common in older dense checkpoints and are left alone.

    Raises:
        ValueError: naming the first such tensor. transformers would cast it to the model's dtype without a word.
    """
    for name, (dtype, shape, file) in header.items():
        integer = dtype in INTEGERS and "weight" in name.rpartition(".")[2]
        if len(shape) > 1 and (integer or dtype.startswith(("F8", "F4"))):
            raise ValueError(
                f"{name} is {dtype} {list(shape)} in {file}: the checkpoint is quantized already. "
                "Load the original 16-bit or 32-bit checkpoint to quantize it"
            )


def _find(header: Header, name: str, prefix: str) -> tuple[str, tuple[int, ...], str] | None:
    """What `header` says of the tensor called `name`, in a model with a head or in one without."""
    return next((header[alias] for alias in aliases(name, prefix) if alias in header), None)
