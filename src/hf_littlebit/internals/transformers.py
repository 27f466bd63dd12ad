"""The private doors of transformers: names that its documentation does not mention, and that a release may change.

Every function here is one door. Its text says what needs it, and what the public way is, or would be if there were one. All
of them were tested with transformers 5.17 to 5.24; tests/test_internals.py walks through each with real models, so a
release that moves a door fails there, by name, before it fails in a loading or a training.

Methods that transformers calls and hf-littlebit overrides in a subclass (those of HfQuantizer) are no doors: compat.py
checks that they exist. What differs between the versions of transformers is in compat.py too. The doors of `generate` are in
transformers_generation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

__all__ = [
    "apply_gate",
    "before_random_fill",
    "empty_of_class",
    "fp32_modules",
    "gates_its_experts",
    "has_adapters",
    "mark_quantized",
    "marked_initialized",
    "may_be_missing",
    "plain_save",
    "plain_saving",
    "plain_upload",
    "register",
    "save_through",
    "save_under_held_names",
    "tie_again",
    "tied_weights",
    "train_on_one_gpu",
    "unmark_quantized",
    "untie",
    "upload_through",
    "whole_models",
]


# -- registering ------------------------------------------------------------------------------------------------------------


def register(name: str, config_class: type, quantizer_class: type) -> None:
    """Make `name` a quantization method of transformers; a second call changes nothing.

    The two registering functions are public, but they raise at a second call, so their mappings are looked into. Only config
    classes in the tuple LOADING_ATTRIBUTES_CONFIG_TYPES may override options of a saved model when it is loaded (dequantize,
    share_inputs), and there is no public way into that tuple.
    """
    from transformers.quantizers import auto

    if name not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(name)(config_class)
    if name not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(name)(quantizer_class)
    types = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if config_class not in types:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, config_class)  # type: ignore[assignment]


# -- what a model says about its weights --------------------------------------------------------------------------------------


def tied_weights(model: nn.Module) -> dict[str, str]:
    """{name of a weight: name of the weight that it is tied to}, empty for a module that is no model of transformers.

    A tied weight is saved once, under the second name, so sizes and complete checkpoints depend on it. Public way: none; to
    compare the addresses of all weights fails for models on the meta device.
    """
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def untie(model: PreTrainedModel, names: Collection[str]) -> None:
    """Take the weights called `names` out of what `model` ties, now and whenever it works that out anew.

    Modules that read one packed table hold no weights that could be tied, and `tie_weights` fails where a weight that it looks
    for is absent. Public way: `tie_word_embeddings=False` in the config, which is saved, and says something else.
    """
    for prefix, part in _models(model):
        kept = {
            target: source
            for target, source in part.get_expanded_tied_weights_keys(all_submodels=False).items()
            if prefix + target not in names
        }
        if part._tied_weights_keys:
            part._tied_weights_keys = kept
        known = getattr(part, "all_tied_weights_keys", None) or {}
        part.all_tied_weights_keys = {target: known[target] for target in known if prefix + target not in names}


def tie_again(model: PreTrainedModel) -> None:
    """Undo `untie`, for a model whose weights are all there, and tie them."""
    for _, part in _models(model):
        vars(part).pop("_tied_weights_keys", None)
    for _, part in _models(model):
        part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def _models(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """(prefix of the names in it, model) of `model` and the models inside it."""
    from transformers import PreTrainedModel

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    return [(f"{name}." if name else "", module) for name, module in found]


def may_be_missing(model: nn.Module) -> list[str]:
    """Patterns of names that a complete checkpoint may lack, because the model's code computes these weights.

    Without it such a weight would be reported as missing from the checkpoint. Public way: none.
    """
    return [*(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())]


def fp32_modules(model: nn.Module, dtype: torch.dtype | None = None) -> set[str]:
    """Names of modules, or parts of names, whose weights the model's own code needs in fp32.

    They stay dense, and keep their dtype when the model is cast, e.g. T5's `wo`. Public way: none.

    Args:
        dtype: what the model is cast to, of which some may be: bf16 is a danger to fewer than fp16.
    """
    names: set[str] = set()
    lenient = () if dtype == torch.bfloat16 else ("_keep_in_fp32_modules",)
    for attribute in (*lenient, "_keep_in_fp32_modules_strict"):
        names.update(getattr(model, attribute, None) or ())
    return names


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT adapters are attached, by PEFT itself or by `model.add_adapter`.

    Such a model trains its adapters and not its bits. Public way: `model.active_adapters()`, which raises without PEFT and
    for models without adapters.
    """
    return bool(getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False))


# -- loading ------------------------------------------------------------------------------------------------------------------


def marked_initialized(value: nn.Parameter) -> nn.Parameter:
    """`value`, marked as initialized, so that `from_pretrained` does not draw random numbers for it.

    A dense checkpoint that is quantized while it loads does not hold the parts of the packed layers, so these would count as
    missing. Public way: a `_init_weights` that knows every layer, but it is a method of the model's class, not of the layer's.
    """
    value._is_hf_initialized = True  # type: ignore[attr-defined]
    return value


def before_random_fill(model: PreTrainedModel, check: Callable[[Any], None]) -> None:
    """Call `check(loading_info)` once, when `from_pretrained` knows what is missing and has not yet filled it at random.

    from_pretrained calls `mark_tied_weights_as_initialized` right before it fills missing weights with random numbers. The
    method is replaced on this one instance, and puts itself back when it is called. Public way: `output_loading_info=True`
    tells only afterwards, when the random numbers cannot be told from weights, and only whoever asked for it.
    """

    def replacement(loading_info: Any) -> None:
        del model.mark_tied_weights_as_initialized
        model.mark_tied_weights_as_initialized(loading_info)
        check(loading_info)

    model.mark_tied_weights_as_initialized = replacement  # type: ignore[method-assign]


def empty_of_class(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """A model of just this class from `config`, with weights as its class initializes them.

    `from_config` is public, but only the Auto classes have it, and they choose another class than a checkpoint's own where a
    model has several heads. Calling the class itself does not settle the dtype and the attention implementation.
    """
    return model_class._from_config(config)


@contextmanager
def whole_models() -> Iterator[None]:
    """Models that are made inside this block are whole, also while DeepSpeed ZeRO-3 trains another one.

    transformers would give each process a part of them, which all processes have to do at the same time. It remembers the
    DeepSpeed config of the training in a module's variable. Public way: `unset_hf_deepspeed_config` clears the variable, but
    nothing public reads it, to put it back.
    """
    from transformers.integrations import deepspeed

    former = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = former


def mark_quantized(config: PretrainedConfig) -> None:
    """Say in `config` that its model is quantized, as `from_pretrained` says it of one that it has quantized.

    Flash attention then takes the dtype of its inputs from the config, not from a weight, which may be packed. Public way: none.
    """
    config._is_quantized = True  # type: ignore[attr-defined]


def unmark_quantized(config: PretrainedConfig) -> None:
    """Undo `mark_quantized`, for a model that has become dense."""
    vars(config).pop("_is_quantized", None)


# -- saving -------------------------------------------------------------------------------------------------------------------


def save_under_held_names(model: PreTrainedModel) -> None:
    """Make `save_pretrained` write the tensors of `model` under the names that they have in it.

    It would turn the names back to an older layout otherwise (Mixtral's `block_sparse_moe`), and a Trainer that restores a
    checkpoint by name would miss them. An empty list of conversions means that there is nothing to turn back; an absent one
    is worked out anew. Public way: `save_original_format=False` of save_pretrained, which whoever saves has to say.
    """
    model._weight_conversions = []  # type: ignore[assignment]


def save_through(model: PreTrainedModel, save: Callable[..., None]) -> None:
    """Make `model.save_pretrained(folder, ...)` call `save(model, folder, ...)`.

    The method is public. It is replaced on this one instance, because nothing public is called when it begins and ends.
    """
    model.save_pretrained = partial(save, model)  # type: ignore[method-assign]


def plain_save(model: PreTrainedModel, folder: Any, *args: Any, **kwargs: Any) -> None:
    """The saving of transformers itself, for a function that `save_through` was given."""
    type(model).save_pretrained(model, folder, *args, **kwargs)


def upload_through(model: PreTrainedModel, upload: Callable[..., Any]) -> None:
    """Make `push_to_hub` call `upload(model, folder, repo_id, ...)` where it would upload what it saved in `folder`.

    Then the model card can be written into the folder first. Public way: none; push_to_hub writes a card of its own, nearly
    empty, and gives a class no say in it.
    """
    model._upload_modified_files = partial(upload, model)  # type: ignore[method-assign]


def plain_upload(model: PreTrainedModel, folder: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """The upload of transformers itself, for a function that `upload_through` was given."""
    return type(model)._upload_modified_files(model, folder, repo_id, *args, **kwargs)


def plain_saving(model: PreTrainedModel) -> None:
    """Undo `save_under_held_names`, `save_through` and `upload_through`: the model is saved and shared as its class does it."""
    for attribute in ("_weight_conversions", "save_pretrained", "_upload_modified_files"):
        vars(model).pop(attribute, None)


# -- training -----------------------------------------------------------------------------------------------------------------


def train_on_one_gpu(arguments: TrainingArguments) -> None:
    """Have a Trainer of `arguments` use the first GPU alone, where it would copy the model to all in every step (DataParallel).

    Public way: CUDA_VISIBLE_DEVICES, which has to be set before the process begins.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)


# -- layers -------------------------------------------------------------------------------------------------------------------


def gates_its_experts(experts_class: type[nn.Module]) -> bool:
    """Whether a class of stacked experts has the gate as a method, as transformers' `use_experts_implementation` gives it.

    Such classes keep their forward elsewhere, so that one forward serves all of them. Public way: none.
    """
    return hasattr(experts_class, "_apply_gate")


def apply_gate(experts_class: type[nn.Module], module: nn.Module, gate_up: Tensor) -> Tensor:
    """The gated activation of `gate_up` [tokens, 2 * intermediate] -> [tokens, intermediate], as the class computes it.

    Models differ here (limits, slopes, an order of their own), so it is not written a second time. Public way: none.
    """
    return experts_class._apply_gate(module, gate_up)  # type: ignore[attr-defined]
