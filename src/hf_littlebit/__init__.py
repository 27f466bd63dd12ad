"""hf-littlebit: language models at 0.1 to 1 bit per weight in Hugging Face transformers.

Importing the package registers the quantization method "littlebit" with transformers, after which

    AutoModelForCausalLM.from_pretrained(dense, quantization_config=LittleBitConfig(bpw=0.55))

quantizes while it loads, and `from_pretrained` of a saved packed model reads it back.
"""

from . import compat
from .config import LittleBitConfig
from .evaluate import perplexity
from .linear import LatentLittleBitLinear, LittleBitLinear
from .quantizer import LittleBitHfQuantizer
from .size import size_report

__version__ = "0.1.0"
__all__ = [
    "LatentLittleBitLinear",
    "LittleBitConfig",
    "LittleBitHfQuantizer",
    "LittleBitLinear",
    "perplexity",
    "size_report",
]

compat.register("littlebit", LittleBitConfig, LittleBitHfQuantizer)
