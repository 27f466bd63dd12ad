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
    from .generate.generation import fast_generate, plain_generate, release_graphs
    from .internals.transformers import register
    from .layers.linear import LatentLittleBitLinear, LittleBitLinear
    from .layers.shared_input import share_inputs, unshare_inputs
    from .load.quantizer import LittleBitHfQuantizer
    from .report.card import upload_with_card
    from .report.evaluate import perplexity
    from .report.size import size_report

    LittleBitHfQuantizer.upload_files = staticmethod(upload_with_card)
    register("littlebit", LittleBitConfig, LittleBitHfQuantizer)

if TYPE_CHECKING:
    from .initialize.calibration import calibrate
    from .initialize.head_inputs import head_moment
    from .load.convert import latent_model, pack_model, unpack_model
    from .refinement.distillation import Schedule
    from .refinement.recipe import Recipe
    from .refinement.refinement import refine
    from .refinement.tuning import Rates
    from .train.callback import LittleBitCallback
    from .train.data import sample_blocks, text_blocks
    from .train.topk import TopKTeacher, save_topk
    from .train.trainer import LittleBitTrainer

__version__ = "0.2.0"
__all__ = [
    "LatentLittleBitLinear",
    "LittleBitCallback",
    "LittleBitConfig",
    "LittleBitHfQuantizer",
    "LittleBitLinear",
    "LittleBitTrainer",
    "Rates",
    "Recipe",
    "Schedule",
    "TopKTeacher",
    "calibrate",
    "fast_generate",
    "head_moment",
    "latent_model",
    "pack_model",
    "perplexity",
    "plain_generate",
    "refine",
    "release_graphs",
    "sample_blocks",
    "save_topk",
    "share_inputs",
    "size_report",
    "text_blocks",
    "unpack_model",
    "unshare_inputs",
]
_LAZY = {  # public name -> the file that has it
    "LittleBitCallback": "train.callback",
    "LittleBitTrainer": "train.trainer",
    "TopKTeacher": "train.topk",
    "Rates": "refinement.tuning",
    "Recipe": "refinement.recipe",
    "Schedule": "refinement.distillation",
    "calibrate": "initialize.calibration",
    "head_moment": "initialize.head_inputs",
    "latent_model": "load.convert",
    "pack_model": "load.convert",
    "refine": "refinement.refinement",
    "sample_blocks": "train.data",
    "save_topk": "train.topk",
    "text_blocks": "train.data",
    "unpack_model": "load.convert",
}


def __getattr__(name: str) -> Any:
    """Import a name of `_LAZY` when it is first asked for.

    Training imports transformers' Trainer, which takes seconds that `import hf_littlebit` should not take.
    """
    if name in _LAZY:
        with compat.explain_missing():
            module = import_module(f".{_LAZY[name]}", __name__)
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
