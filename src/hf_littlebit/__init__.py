"""hf-littlebit: language models at 0.1 to 1 bit per weight in Hugging Face transformers.

Importing the package registers the quantization method "littlebit" with transformers, after which

    AutoModelForCausalLM.from_pretrained(dense, quantization_config=LittleBitConfig(bpw=0.55))

quantizes while it loads, and `from_pretrained` of a saved packed model reads it back. For training,

    Trainer(model=dense, ..., callbacks=[LittleBitCallback(LittleBitConfig(bpw=0.3), teacher="self")])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import compat

with compat.explain_missing():
    from .config import LittleBitConfig
    from .evaluate import perplexity
    from .generation import fast_generate, plain_generate, release_graphs
    from .linear import LatentLittleBitLinear, LittleBitLinear
    from .quantizer import LittleBitHfQuantizer
    from .shared import share_inputs, unshare_inputs
    from .size import size_report

    compat.register("littlebit", LittleBitConfig, LittleBitHfQuantizer)

if TYPE_CHECKING:
    from .calibration import calibrate
    from .data import sample_blocks, text_blocks
    from .topk import TopKTeacher, save_topk
    from .trainer import LittleBitTrainer
    from .training import LittleBitCallback
    from .twins import latent_model, pack_model, unpack_model

__version__ = "0.2.0"
__all__ = [
    "LatentLittleBitLinear",
    "LittleBitCallback",
    "LittleBitConfig",
    "LittleBitHfQuantizer",
    "LittleBitLinear",
    "LittleBitTrainer",
    "TopKTeacher",
    "calibrate",
    "fast_generate",
    "latent_model",
    "pack_model",
    "perplexity",
    "plain_generate",
    "release_graphs",
    "sample_blocks",
    "save_topk",
    "share_inputs",
    "size_report",
    "text_blocks",
    "unpack_model",
    "unshare_inputs",
]
_TRAINING = {
    "LittleBitCallback": "training",
    "LittleBitTrainer": "trainer",
    "TopKTeacher": "topk",
    "calibrate": "calibration",
    "latent_model": "twins",
    "pack_model": "twins",
    "sample_blocks": "data",
    "save_topk": "topk",
    "text_blocks": "data",
    "unpack_model": "twins",
}


def __getattr__(name: str) -> Any:
    """What training needs, imported when first asked for: transformers' Trainer takes seconds to import."""
    if name in _TRAINING:
        with compat.explain_missing():
            module = import_module(f".{_TRAINING[name]}", __name__)
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
