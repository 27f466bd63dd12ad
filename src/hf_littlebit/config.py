"""LittleBitConfig: what a user asks for, checked when it is written, and the arithmetic from bits per weight to ranks.

A layer of `out_features x in_features` (m x n) with P paths of rank r is stored in

    bits = P * [ r * (m + n' + 16) + 16 * (m + n) ]        bits per weight = bits / (m * n)

where n' is n rounded up to a multiple of 8 (kernels/packing.py), so n' = n in practice. Solved for r and floored to a
multiple of 8, at least 8 and at most min(m, n) (LittleBit, arXiv 2506.13771, appendix D). That is what a new layer gets. The
ranks of a saved one are read off the shapes of its parts (layers/parts.py), which say how many paths there are and what their
ranks add up to, but not how they share it: paths of one layer have equal ranks, unless the arithmetic here says otherwise.
"""

from __future__ import annotations

import fnmatch
import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .initialize.factorize import INITS
from .kernels.packing import stored_bits

__all__ = [
    "FORMATS",
    "FORMAT_VERSION",
    "LayerConfig",
    "LittleBitConfig",
    "bits_of",
    "bpw_of",
    "exact_rank",
    "layer_ranks",
    "matches",
]

FORMAT_VERSION = 1
FORMATS = ("packed", "latent")
SCALE_DTYPES = ("bfloat16", "float16")
SCALE_BITS = 16
RANK_MULTIPLE = 8
MAX_BPW = 16.0
KV_NAMES = ("k_proj", "v_proj")
# Options that only steer a load on this machine: a user may set them for a saved model too, and they are not saved.
LOADING_OPTIONS = ("svd_device", "workers", "dequantize", "share_inputs")
LAYER_OPTIONS = ("bpw", "init", "residual", "kv_factor")
MISSING_BPW = "bpw is missing; say how many bits per weight to keep, e.g. LittleBitConfig(bpw=0.55)"


def bits_of(out_features: int, in_features: int, ranks: tuple[int, ...]) -> int:
    """Bits that the file holds for one layer: signs with their padding, and three 16-bit scale vectors per path."""
    signs = sum(stored_bits(rank) * out_features + stored_bits(in_features) * rank for rank in ranks)
    scales = SCALE_BITS * (len(ranks) * (out_features + in_features) + sum(ranks))
    return signs + scales


def bpw_of(out_features: int, in_features: int, ranks: tuple[int, ...]) -> float:
    """Bits per replaced weight of one layer, as the file holds it."""
    return bits_of(out_features, in_features, ranks) / (out_features * in_features)


def exact_rank(out_features: int, in_features: int, bpw: float, paths: int) -> float:
    """The rank per path that meets `bpw` exactly, before it is floored (may be negative for small layers)."""
    columns = stored_bits(in_features)
    scales = SCALE_BITS * paths * (out_features + in_features)
    return (bpw * out_features * in_features - scales) / (paths * (out_features + columns + SCALE_BITS))


def layer_ranks(out_features: int, in_features: int, bpw: float, paths: int, factor: float = 1.0) -> tuple[int, ...]:
    """The rank of each path: `factor` times `exact_rank`, floored to a multiple of 8 and held within 8 .. min(out, in)."""
    asked = int(factor * exact_rank(out_features, in_features, bpw, paths) // RANK_MULTIPLE) * RANK_MULTIPLE
    ceiling = min(out_features, in_features) // RANK_MULTIPLE * RANK_MULTIPLE
    return (max(RANK_MULTIPLE, min(asked, ceiling)),) * paths


@dataclass(frozen=True)
class LayerConfig:
    """The options that hold for one layer, after its overrides."""

    bpw: float
    init: str
    residual: bool | None
    factor: float  # multiplies the rank: kv_factor for k_proj and v_proj, else 1
    leftover: bool = False  # the factor is for plan_model to find: k_proj and v_proj under kv_factor=None

    def ranks(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The rank of each path of an `out_features x in_features` layer; their number says how many paths there are."""
        if self.residual is not None:
            return layer_ranks(out_features, in_features, self.bpw, 2 if self.residual else 1, self.factor)
        one = layer_ranks(out_features, in_features, self.bpw, 1, self.factor)
        two = layer_ranks(out_features, in_features, self.bpw, 2, self.factor)
        fits = exact_rank(out_features, in_features, self.bpw, 2) >= RANK_MULTIPLE
        # ADMM's single path beats two at equal bits (README table); a second one pays only for bits that a full-rank
        # first path cannot take. The SVD initialisers need the second path wherever the layer has room for it.
        if self.init == "admm":
            full = exact_rank(out_features, in_features, self.bpw, 1) >= min(out_features, in_features)
            return two if fits and full and sum(two) > sum(one) else one
        return two if fits else one


class LittleBitConfig(QuantizationConfigMixin):
    """Quantize every linear layer of a model to `bpw` bits per weight while it is loaded.

    Args:
        bpw (`float`): bits per weight of the replaced layers, in (0, 16]; 0.1 to 1 is what the method is for. Only
            `LittleBitConfig(dequantize=True)` or `(share_inputs=...)`, to load a saved model with, can do without: the saved
            one is used.
        init (`str`): how factors are found: "admm" (default, best and slowest), "joint_itq", or "dual_svid" (the paper's).
        residual (`bool`, *optional*): two paths (True), one (False), or chosen by initialiser and layer size (None).
        kv_factor (`float`, *optional*): multiplies the rank of layers named k_proj and v_proj. The paper uses 4 for
            grouped-query models, whose key and value layers are so small that their rank collapses at 0.1 bits. None: the
            largest up to 4 that the bits asked for the whole model allow, which rounding ranks down leaves some of.
        modules_to_not_convert (`list[str]`, *optional*): names, name endings or regular expressions of modules to leave
            dense, in addition to the output head, tied weights and the embeddings. Each is used as a regular expression
            from the start of a name, and must be a valid one.
        module_config (`dict[str, dict]`, *optional*): overrides by module name, e.g. `{"*.down_proj": {"bpw": 1.0}}`. A
            pattern with `*`, `?` or `[` is matched against the whole name; any other must be the name or its dotted end.
            Later entries win. Options: bpw, init, residual, kv_factor.
        format (`str`): "packed" (bits; inference, adapters) or "latent" (fp32 latents; quantization-aware training).
        seed (`int`): of the initialiser's random numbers; each layer derives its own from it and its name. Factors repeat
            bit for bit with the same seed, machine and number of threads (`workers` share the threads among them).
        steps (`int`, *optional*): ADMM steps or Joint-ITQ iterations; None for the initialiser's default.
        refit_rounds (`int`, *optional*): rounds of the closed-form scale refit; None for the initialiser's default.
        scale_dtype (`str`): "bfloat16" (any range) or "float16" (finer), of the stored scales.
        svd_device (`str`, *optional*): device that factorizes, e.g. "cuda"; None for the device a weight is loaded to.
        workers (`int`): layers factorized at the same time. Each holds one dense layer and its workspace.
        dequantize (`bool`): load a saved model as a dense one. Refused for a dense model.
        share_inputs (`bool`, *optional*): compute layers that read the same tensor (q, k and v; gate and up) in one call; for
            packed models, and not saved (shared_input.py). By default on a GPU alone, where it is faster.
        base_model (`str`, *optional*): Hub id of the dense model, for the model card; filled in while loading from the Hub.

    Raises:
        ValueError: for unknown options and impossible values, with the value, the limit and the remedy.
    """

    def __init__(
        self,
        bpw: float | None = None,
        init: str = "admm",
        residual: bool | None = None,
        kv_factor: float | None = None,
        modules_to_not_convert: list[str] | None = None,
        module_config: dict[str, dict[str, Any]] | None = None,
        format: str = "packed",
        seed: int = 0,
        steps: int | None = None,
        refit_rounds: int | None = None,
        scale_dtype: str = "bfloat16",
        svd_device: str | None = None,
        workers: int = 1,
        dequantize: bool = False,
        share_inputs: bool | None = None,
        base_model: str | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = "littlebit",
        **unknown: Any,
    ):
        self.quant_method = quant_method  # type: ignore[assignment]  # a plain name serves as well as the enum's
        self.bpw = bpw
        self.init = init
        self.residual = residual
        self.kv_factor = kv_factor
        self.modules_to_not_convert = modules_to_not_convert
        self.module_config = module_config
        self.format = format
        self.seed = seed
        self.steps = steps
        self.refit_rounds = refit_rounds
        self.scale_dtype = scale_dtype
        self.svd_device = svd_device
        self.workers = workers
        self.dequantize = dequantize
        self.share_inputs = share_inputs
        self.base_model = base_model
        self.format_version = format_version
        # The version first: a newer format explains the options that this version does not know.
        self._check_version()
        if unknown:
            known = sorted(set(self.__dict__) - {"quant_method"})
            raise ValueError(
                f"unknown LittleBitConfig option {sorted(unknown)[0]!r}; the options are {', '.join(known)}"
            )
        self.post_init()

    def _check_version(self) -> None:
        if self.quant_method != "littlebit":
            raise ValueError(
                f"quant_method is {self.quant_method!r}, but LittleBitConfig reads only 'littlebit'; "
                "load this checkpoint with the library that wrote it"
            )
        version = self.format_version
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version is {version!r}; it must be an integer from 1 to {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has format version {version}, newer than {FORMAT_VERSION}, the latest that this "
                "hf-littlebit reads; upgrade with: pip install -U hf-littlebit"
            )

    def post_init(self) -> None:
        """Check every value (the name is transformers' convention)."""
        if not isinstance(self.dequantize, bool):
            raise ValueError(f"dequantize is {self.dequantize!r}; it must be True or False")
        if self.share_inputs is not None and not isinstance(self.share_inputs, bool):
            raise ValueError(f"share_inputs is {self.share_inputs!r}; it must be True, False, or None (on a GPU alone)")
        if self.dequantize and self.share_inputs:
            raise ValueError(
                "share_inputs is for packed models, but dequantize=True loads a dense one; leave one of them out"
            )
        if self.bpw is None and not self.dequantize and self.share_inputs is None:
            raise ValueError(MISSING_BPW)
        given = self.layer_options()
        _check_layer_options(given if self.bpw is not None else {**given, "bpw": MAX_BPW}, "")
        _choice("format", self.format, FORMATS)
        _choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _integer("seed", self.seed, 0, 2**63 - 1)
        _integer("workers", self.workers, 1, 1024)
        for option, smallest in (("steps", 1), ("refit_rounds", 0)):
            if getattr(self, option) is not None:
                _integer(option, getattr(self, option), smallest, 100_000)
        for option, example in (("svd_device", "device name such as 'cpu' or 'cuda'"), ("base_model", "Hub id")):
            value = getattr(self, option)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{option} is {value!r}; it must be a {example}, or None")
        names = self.modules_to_not_convert
        if names is not None:
            if not isinstance(names, list | tuple):
                raise ValueError(
                    f"modules_to_not_convert is {reprlib.repr(names)}; it must be a list of module names, or None"
                )
            for name in names:
                _check_name("modules_to_not_convert", name)
            self.modules_to_not_convert = list(names)
        if self.module_config is None:
            return
        if not isinstance(self.module_config, dict):
            raise ValueError(
                f"module_config is {reprlib.repr(self.module_config)}; it must be a dict of name pattern -> options"
            )
        for pattern, options in self.module_config.items():
            if not isinstance(pattern, str) or not pattern or not isinstance(options, dict) or not options:
                raise ValueError(
                    f"module_config entry {pattern!r}: {reprlib.repr(options)} must map a name pattern to a dict of options, "
                    "e.g. {'*.down_proj': {'bpw': 1.0}}"
                )
            _check_layer_options(options, f"module_config[{pattern!r}]: ")

    def layer_options(self) -> dict[str, Any]:
        """The options that a module may override, with their global values."""
        return {option: getattr(self, option) for option in LAYER_OPTIONS}

    def for_module(self, name: str, *aliases: str) -> LayerConfig:
        """The options that hold for the module called `name`, or by one of `aliases`.

        Raises:
            ValueError: if there is no bpw, as in a config that only says dequantize=True or share_inputs.
        """
        options = self.layer_options()
        own: set[str] = set()
        for pattern, overrides in (self.module_config or {}).items():
            if any(matches(pattern, each) for each in (name, *aliases)):
                options.update(overrides)
                own.update(overrides)
        if options["bpw"] is None:
            raise ValueError(MISSING_BPW)
        kv_factor = options.pop("kv_factor")
        if name.rpartition(".")[2] not in KV_NAMES:
            return LayerConfig(factor=1.0, **options)
        # Bits that were asked for these very layers are what they get.
        return LayerConfig(factor=kv_factor or 1.0, leftover=kv_factor is None and "bpw" not in own, **options)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained(saved, quantization_config=...)` may set for a saved model: where and how to load it."""
        return {option: getattr(self, option) for option in LOADING_OPTIONS}

    def to_dict(self) -> dict[str, Any]:
        """The saved options; those of this machine alone (LOADING_OPTIONS) are left out."""
        return {key: value for key, value in super().to_dict().items() if key not in LOADING_OPTIONS}

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults, with bpw and the method's name always."""
        default = LittleBitConfig(bpw=MAX_BPW).to_dict()
        always = ("quant_method", "bpw", "format_version")
        return {k: v for k, v in self.to_dict().items() if k in always or v != default.get(k)}


def matches(pattern: str, name: str) -> bool:
    """True if a `module_config` pattern is for the module called `name`."""
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def _check_layer_options(options: dict[str, Any], where: str) -> None:
    for option, value in options.items():
        if option == "bpw":
            _number(f"{where}bpw", value, MAX_BPW, "0.1 to 1 is what the method is for")
        elif option == "kv_factor":
            if value is None and not where:
                continue
            _number(f"{where}kv_factor", value, 64.0, "4 is the paper's choice for grouped-query models")
        elif option == "init":
            _choice(f"{where}init", value, INITS)
        elif option == "residual":
            if value is not None and not isinstance(value, bool):
                raise ValueError(
                    f"{where}residual is {value!r}; it must be True (two paths), False (one) or None (choose)"
                )
        else:
            raise ValueError(f"{where}unknown option {option!r}; a module can override {', '.join(LAYER_OPTIONS)}")


def _check_name(option: str, name: Any) -> None:
    """Refuse what transformers cannot match with module names: it puts each entry into a regular expression."""
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{option} holds {reprlib.repr(name)}; every entry must be a module's name, such as 'down_proj'"
        )
    try:
        re.compile(name)
        re.compile(f"(?:{name})")  # as should_convert_module puts it: a flag such as (?i) is valid alone only
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{option} holds {reprlib.repr(name)}, which is no valid regular expression ({error}); write '.*' where any "
            "text may stand, and a backslash before a sign that is meant literally"
        ) from None


def _number(name: str, value: Any, largest: float, advice: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 < value <= largest:
        raise ValueError(f"{name} is {value!r}; it must be a number above 0 and at most {largest:g} ({advice})")


def _integer(name: str, value: Any, smallest: int, largest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
        raise ValueError(f"{name} is {value!r}; it must be an integer from {smallest} to {largest}")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {reprlib.repr(value)}; choose one of {', '.join(choices)}")
