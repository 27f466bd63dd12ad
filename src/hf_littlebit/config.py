"""LittleBitConfig: what a user asks for, checked when it is written, and what of it holds for one layer.

The values that options may have are in option_rules.py, and the arithmetic from bits per weight to ranks in ranks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .kernels.packing import FORMAT_VERSION
from .module_names import check_pattern, matches
from .option_rules import (
    CONVERTED_RULES,
    FORMATS,
    LAYER_OPTIONS,
    MAX_BPW,
    RULES,
    check_module_config,
    check_ranks,
    check_version,
)
from .ranks import SCALE_BITS, bits_of, bpw_of, exact_rank, layer_ranks, path_ranks

__all__ = [
    "FORMATS",
    "FORMAT_VERSION",
    "LayerConfig",
    "LittleBitConfig",
    "bits_of",
    "bpw_of",
    "exact_rank",
    "layer_ranks",
]

KV_NAMES = ("k_proj", "v_proj")
# These options only steer a load on this machine: a user may set them for a saved model too, and they are not saved.
LOADING_OPTIONS = {"svd_device": None, "workers": 1, "dequantize": False, "share_inputs": None}
# This one only says which layers a new model gets; of a saved one its tensors say it.
PLANNING_OPTIONS = ("text_only",)
MISSING_BPW = "bpw is missing; say how many bits per weight to keep, e.g. LittleBitConfig(bpw=0.55)"


@dataclass(frozen=True)
class LayerConfig:
    """The options that hold for one layer, after its overrides."""

    bpw: float
    init: str
    residual: bool | None
    factor: float  # multiplies the rank: kv_factor for k_proj and v_proj, else 1
    auto_kv_factor: bool = False  # plan_model finds the factor: this is a k_proj or v_proj, and kv_factor is None
    scale_bits: int = SCALE_BITS  # of each stored scale
    shares: bool = False  # its bits are the model's to share out (budget.py): nothing was asked for this layer by name
    given: tuple[int, ...] | None = None  # ranks that the config says itself

    def ranks(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The rank of each path of an `out_features x in_features` layer; their number says how many paths there are."""
        if self.given is not None:
            return self.given
        return path_ranks(out_features, in_features, self.bpw, self.init, self.residual, self.factor)


class LittleBitConfig(QuantizationConfigMixin):
    """Quantize the linear layers of a model to `bpw` bits per weight while it is loaded.

    Args:
        bpw (`float`): bits per weight of the replaced layers together, scales included, in (0, 16]; 0.1 to 1 is what the
            method is for. The model meets them within 1 % where its layers are large enough (budget.py); single layers
            differ by a step of their rank. Only `LittleBitConfig(dequantize=True)` or `(share_inputs=...)`, to load a saved
            model with, can do without, since the saved one is used.
        init (`str`): how factors are found: "admm" (default, best and slowest), "joint_itq", or "dual_svid" (the paper's).
        residual (`bool`, *optional*): two paths (True), one (False), or chosen by initialiser and layer size (None).
        kv_factor (`float`, *optional*): multiplies the rank of layers named k_proj and v_proj. The paper uses 4 for
            grouped-query models, whose key and value layers are so small that their rank collapses at 0.1 bits. None: the
            largest up to 4 that the bits asked for the whole model allow, which rounding ranks down leaves some of.
        modules_to_not_convert (`list[str]`, *optional*): names, name endings or regular expressions of modules to leave
            dense, in addition to the output head, tied weights and the embeddings. Each is used as a regular expression
            from the start of a name, and must be a valid one; each must name a module of the model. "re:..." is an expression
            that need only match the start of a name, as other tools write it.
        text_only (`bool`): leave the vision towers, audio encoders and projectors of composite models dense; with False they
            are quantized like the text model. Not saved: a saved model's tensors say it.
        module_config (`dict[str, dict]`, *optional*): overrides by module name, e.g. `{"*.down_proj": {"bpw": 1.0}}`. A
            pattern with `*`, `?` or `[` is matched against the whole name; any other must be the name or its dotted end.
            Later entries win. Options: bpw, init, residual, kv_factor.
        ranks (`dict[str, list[int]]`, *optional*): the rank of each path, by module name as in `module_config`, in place of
            what `bpw` gives, e.g. `{"*.up_proj": [400]}`; multiples of 8. Filled in while a model is
            quantized. Names of stacked experts end in that of the weight.
        format (`str`): "packed" (bits; inference, adapters) or "latent" (fp32 latents; quantization-aware training).
        seed (`int`): of the initialiser's random numbers; each layer derives its own from it and its name. Factors repeat
            bit for bit with the same seed, machine and number of threads (`workers` share the threads among them).
        steps (`int`, *optional*): ADMM steps or Joint-ITQ iterations; None for the initialiser's default.
        refit_rounds (`int`, *optional*): rounds of the closed-form scale refit; None for the initialiser's default.
        scale_dtype (`str`): "bfloat16" (any range) or "float16" (finer), of the stored scales. A converted model may have
            "float32", where 16 bits do not hold the other program's scales.
        embedding_bits, head_bits (`int`): of the input embeddings and of the output head: 16 (as they are), 8 or 4. Where a
            model ties the two, one stored table serves both, so both must be given the same. With `format="latent"` they are
            trained dense, and packed with the layers at the end.
        svd_device (`str`, *optional*): device that factorizes, e.g. "cuda"; None for the device a weight is loaded to.
        workers (`int`): layers factorized at the same time. Each holds one dense layer and its workspace.
        dequantize (`bool`): load a saved model as a dense one. Refused for a dense model.
        share_inputs (`bool`, *optional*): compute layers that read the same tensor (q, k and v; gate and up) in one call; for
            packed models, and not saved (shared_input.py). By default on a GPU alone, where it is faster.
        base_model (`str`, *optional*): Hub id of the dense model, for the model card; filled in while loading from the Hub.
        converted_from (`str`, *optional*): the layout of another program that `littlebit convert` made the layers from, e.g.
            "nanoquant"; filled in by it.
        save_id (`str`, *optional*): what `save_pretrained` writes to say which files belong together. It is of the files, so
            a config in memory has none.

    Raises:
        ValueError: for unknown options and impossible values, with the value, the limit and the remedy.
    """

    # Of the class until they are set, so that a config's attributes are its options.
    loading_options_read: tuple[str, ...] = ()  # LOADING_OPTIONS that a dict gave: the user's, or a file's
    save_id: str | None = None  # only while a model is saved; load/save_id.py reads the files' own

    def __init__(
        self,
        /,  # so that a file's option "self" is an unknown one, too
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
        embedding_bits: int = 16,
        head_bits: int = 16,
        svd_device: str | None = None,
        workers: int = 1,
        dequantize: bool = False,
        share_inputs: bool | None = None,
        base_model: str | None = None,
        converted_from: str | None = None,
        save_id: str | None = None,
        text_only: bool = True,
        ranks: dict[str, list[int]] | None = None,
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
        self.embedding_bits = embedding_bits
        self.head_bits = head_bits
        self.svd_device = svd_device
        self.workers = workers
        self.dequantize = dequantize
        self.share_inputs = share_inputs
        self.base_model = base_model
        self.converted_from = converted_from
        self.text_only = text_only
        self.ranks = ranks
        self.format_version = format_version
        # The version is checked first, because a newer format explains the options that this version does not know.
        check_version(quant_method, format_version)
        if unknown:
            known = sorted(set(self.__dict__) - {"quant_method"})
            raise ValueError(
                f"unknown LittleBitConfig option {sorted(unknown)[0]!r}; the options are {', '.join(known)}"
            )
        self.post_init()

    def post_init(self) -> None:
        """Check every value. The name is transformers' convention.

        Raises:
            ValueError: for the first value that its rule does not allow.
        """
        if self.bpw is None and not self.dequantize and self.share_inputs is None:
            raise ValueError(MISSING_BPW)
        for option, rule in (RULES if self.converted_from is None else CONVERTED_RULES).items():
            value = getattr(self, option)
            if value is not None or not rule.optional:
                rule.check(option, value)
        if self.dequantize and self.share_inputs:
            raise ValueError(
                "share_inputs is for packed models, but dequantize=True loads a dense one; leave one of them out"
            )
        if self.modules_to_not_convert is not None:
            for name in self.modules_to_not_convert:
                check_pattern("modules_to_not_convert", name)
            self.modules_to_not_convert = list(self.modules_to_not_convert)
        check_module_config(self.module_config or {})
        check_ranks(self.ranks or {})
        if self.ranks is not None:
            self.ranks = {pattern: list(ranks) for pattern, ranks in self.ranks.items()}

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
        options["scale_bits"] = 32 if self.scale_dtype == "float32" else SCALE_BITS
        for pattern, ranks in (self.ranks or {}).items():
            if any(matches(pattern, each) for each in (name, *aliases)):
                options["given"] = tuple(ranks)
        # A layer whose own bpw the user wrote down gets these bits, and none of the leftover ones.
        free = "bpw" not in own and "given" not in options
        if name.rpartition(".")[2] not in KV_NAMES:
            return LayerConfig(factor=1.0, shares=free, **options)
        free = free and kv_factor is None
        return LayerConfig(factor=kv_factor or 1.0, auto_kv_factor=free, shares=free, **options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As transformers' own; the config remembers which options of LOADING_OPTIONS stood in the dict."""
        result: Any = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        config = result[0] if return_unused_kwargs else result
        config.loading_options_read = tuple(option for option in LOADING_OPTIONS if option in config_dict)
        return result

    def ignore_loading_options(self) -> list[str]:
        """Give the options of LOADING_OPTIONS that were read from a saved model's file their defaults; returns their names.

        No version writes them there. They decide what this machine does, which is for its user to say.
        """
        names = [name for name in self.loading_options_read if getattr(self, name) != LOADING_OPTIONS[name]]
        for name in names:
            setattr(self, name, LOADING_OPTIONS[name])
        self.loading_options_read = ()
        return names

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained(saved, quantization_config=...)` may set for a saved model: where and how to load it."""
        # The last entry says of the saved model's config, which transformers gives these values, that none is the file's.
        return {option: getattr(self, option) for option in LOADING_OPTIONS} | {"loading_options_read": ()}

    def to_dict(self) -> dict[str, Any]:
        """The saved options; those of this machine alone (LOADING_OPTIONS) and of a new model's plan are left out."""
        # Earlier versions do not know these, and read what has none of them.
        later = {"converted_from": None, "ranks": None, "save_id": None, "embedding_bits": 16, "head_bits": 16}
        absent = {option for option, default in later.items() if getattr(self, option) == default}
        left_out = {*LOADING_OPTIONS, *PLANNING_OPTIONS, "loading_options_read"} | absent
        return {key: value for key, value in super().to_dict().items() if key not in left_out}

    def get(self, option: str, default: Any = None) -> Any:
        """The value of `option`, as a dict's `get`: transformers asks so for the method of a config, in memory or read."""
        return getattr(self, option, default)

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults, with bpw and the method's name always."""
        default = LittleBitConfig(bpw=MAX_BPW).to_dict()
        always = ("quant_method", "bpw", "format_version")
        return {k: v for k, v in self.to_dict().items() if k in always or v != default.get(k)}
