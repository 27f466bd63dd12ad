"""The quantized linear layer, packed for inference and latent for training.

    y = sum_p scale_out_p * (U_p (scale_rank_p * (V_p^T (scale_in_p * x)))) + bias      (LittleBit, arXiv 2506.13771, eq. 5)

LittleBitLinear        U and V as bits, the scales as 16-bit floats; all frozen, with a gradient for x and the bias.
LatentLittleBitLinear  U and V as fp32 latents whose sign is used, the scales as fp32 rounded to 16 bits in the forward; trainable.

Both are `nn.Linear`s whose `.weight` is their U: transformers without this plugin then meets a tensor of the wrong shape
and refuses the checkpoint, and PEFT attaches adapters as to any linear layer. parts.py says what a weight is stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..internals.torch import own_parameters
from ..internals.transformers import marked_initialized
from ..kernels import PackedLayer
from . import ops
from .bits import WAY_OUT, Bits, DenseWeight, asked_by_peft
from .eager import Repeated, repeated
from .latent_matmul import factored_product
from .parts import (
    LATENT_PARTS,
    PACKED_PARTS,
    keeping_dtypes,
    latent_parts,
    latent_paths,
    pack_parts,
    part_name,
    part_shapes,
    unpack_paths,
)
from .path import Path, cast, dense_weight
from .sign import ALPHA, SignGradient

__all__ = ["FactorModule", "LatentLittleBitLinear", "LittleBitLinear", "autocast_input"]

ADAPTED_LATENT = (
    "adapters attach to packed LittleBit layers, but this one holds latents, which are trained themselves; call "
    "pack_model(model) first, or train the latents with LittleBitCallback"
)
FORWARD_PARAMETERS = (*(part_name("weight", part) for part in PACKED_PARTS), "bias")


class FactorModule(nn.Module):
    """A module that holds the parts of one or more weights as parameters and keeps their dtypes whatever it is cast to."""

    scale_dtype: torch.dtype
    part_dtypes: dict[str, torch.dtype]  # of the declared parts, by parameter name
    bit_weights: list[str]  # weights whose names are borne by the words of their U
    sign_gradient: str = "smooth"  # what passes the sign of latents backward, and its steepness (sign.py)
    alpha: float = ALPHA

    def __init__(self, scale_dtype: torch.dtype):
        nn.Module.__init__(self)
        self.scale_dtype, self.part_dtypes, self.bit_weights = scale_dtype, {}, []

    def __getattr__(self, name: str) -> Any:
        # Only for what is no plain attribute: parameters, buffers and modules.
        value = super().__getattr__(name)
        if (
            name not in vars(self).get("bit_weights", ())
            or type(value) is not nn.Parameter
            or value.dtype != torch.int32
        ):
            return value
        if isinstance(self, nn.Linear) and asked_by_peft():
            return DenseWeight.of(self)
        return value if value.is_meta else Bits.of(value)  # without words, transformers knows a weight by its identity

    def __setattr__(self, name: str, value: Any) -> None:
        held = own_parameters(self).get(name) if name in vars(self).get("bit_weights", ()) else None
        if (
            held is not None
            and not held.is_floating_point()
            and isinstance(value, Tensor)
            and value.is_floating_point()
        ):
            raise ValueError(WAY_OUT)
        if isinstance(value, Bits):  # that was read here, or of another layer, and is put (back) in its place
            plain = value.as_subclass(Tensor)
            value = plain if held is None else nn.Parameter(plain, requires_grad=False)
        super().__setattr__(name, value)

    def declare(
        self,
        weight: str,
        part: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str | None,
        train: bool,
    ) -> None:
        """Register an uninitialised parameter for one part of `weight`."""
        value = nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=device), requires_grad=train)
        self.register_parameter(part_name(weight, part), marked_initialized(value))
        self.part_dtypes[part_name(weight, part)] = dtype

    def declare_parts(
        self,
        weight: str,
        size: tuple[int, int],
        ranks: Sequence[int],
        latent: bool,
        device: torch.device | str | None,
        lead: tuple[int, ...] = (),
    ) -> None:
        """Register the parts of a weight of `size` (out, in); `lead` is (experts,) for a stack of weights."""
        shapes = part_shapes(*size, ranks, latent, self.scale_dtype)
        if not latent:
            self.bit_weights.append(weight)
        for part in LATENT_PARTS if latent else PACKED_PARTS:
            if part in shapes:
                shape, dtype = shapes[part]
                self.declare(weight, part, (*lead, *shape), dtype, device, train=latent)
            else:
                self.register_parameter(part_name(weight, part), None)

    def ranks_of(self, weight: str) -> tuple[int, ...]:
        """The ranks of the paths of the weight called `weight`."""
        raise NotImplementedError

    def parts(self, weight: str, names: Sequence[str], index: int | None = None) -> dict[str, Any]:
        """{part: parameter or None} of `weight`, or of the `index`-th weight of a stack."""
        values = {part: self._held(part_name(weight, part)) for part in names}
        if index is None:
            return values
        return {part: None if value is None else value[index] for part, value in values.items()}

    def _held(self, name: str) -> Any:
        """The parameter called `name`, or what a wrapper (parametrizations, sharding) has put in its place."""
        held = own_parameters(self)
        return held[name] if name in held else getattr(self, name)

    def fill(self, weight: str, parts: dict[str, Tensor]) -> None:
        """Set the declared parts of `weight` from tensors of the same shapes, in place of the parameters."""
        for part, value in parts.items():
            name = part_name(weight, part)
            train = getattr(self, name).requires_grad
            self.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=train))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast of the model (`.to(torch.float16)`, `.float()`) must not touch the stored scales and latents: only their
        # device follows. The bias is an ordinary parameter.
        kept = {id(self._parameters[name]) for name in self.part_dtypes}
        return super()._apply(keeping_dtypes(fn, kept), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Some libraries cast parameters one by one (peft prepares a model for training so); the file holds 16 bits.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dtype in self.part_dtypes.items():
            value = destination.get(prefix + name)
            if value is not None and value.dtype != dtype and value.is_floating_point() == dtype.is_floating_point:
                destination[prefix + name] = value.to(dtype)


def autocast_input(x: Tensor) -> Tensor:
    """x as `nn.Linear` would take it: cast to the autocast dtype where autocast is on."""
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(
        device_type
    ):  # torch does not let itself be asked about meta
        return x.to(torch.get_autocast_dtype(device_type))
    return x


class _FactoredLinear(FactorModule, nn.Linear):
    """What packed and latent linear layers have in common: sizes, bias, and the parts of the weight "weight"."""

    latent: ClassVar[bool]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
    ):
        FactorModule.__init__(self, scale_dtype)
        self.in_features, self.out_features, self.ranks = in_features, out_features, list(ranks)
        # First: transformers takes a model's dtype from its first floating parameter, which should not be a scale.
        value = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", value)
        self.declare_parts("weight", (out_features, in_features), ranks, self.latent, device)

    def ranks_of(self, weight: str) -> tuple[int, ...]:
        return tuple(self.ranks)

    def paths(self) -> list[Path]:
        """The factors in fp32, as initialisers make them (path.py)."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight this layer stands for, [out_features, in_features] of `dtype`, without gradients.

        Raises:
            ValueError: if it leaves the range of `dtype`.
        """
        return cast(dense_weight(self.paths()), dtype)

    def dequantize(self) -> Tensor:
        """`dense()` under the name that PEFT asks for: it computes DoRA's norms with the weight that this gives."""
        return self.dense()

    def _twin(self, form: type[Twin], parts: dict[str, Tensor]) -> Twin:
        """A layer of the other form with these parts and this layer's bias."""
        bias = self.bias is not None
        twin = form(self.in_features, self.out_features, self.ranks, bias, "meta", scale_dtype=self.scale_dtype)
        twin.fill("weight", parts)
        twin.bias = self.bias
        return twin.train(self.training)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, ranks={self.ranks}, bias={self.bias is not None}"


Twin = TypeVar("Twin", bound=_FactoredLinear)


class LittleBitLinear(_FactoredLinear):
    """A linear layer on packed bits. `.weight` is U's words, int32 [sum_p r_p // 32, out_features].

    Args:
        ranks: rank of each path.
        dtype: of the bias. scale_dtype: of the scales, whatever the model is cast to.

    The parts are uninitialised until they are loaded or filled. x [..., in_features] of fp32, bf16 or fp16.
    """

    latent = False
    group: Any = None  # a shared_input.SharedInput whose member `place` this layer is
    place = 0
    _repeated: Repeated | None = None  # what this layer alone launched before

    def forward(self, x: Tensor) -> Tensor:
        group = self.group
        if group is not None and (group.everywhere or not x.is_cpu):
            result = group.product(self.place, x)
            if result is not None:
                return result
        x = autocast_input(x)
        if not torch.compiler.is_compiling() and self._repeated is not None and not torch.is_grad_enabled():
            found = self._repeated(x, (self._parameters,))
            if found is not None:
                return found[0]
        layer = self.packed()
        y = ops.linear(x, layer)
        if y.is_cuda and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self._repeated = repeated(x, (layer,), (self._parameters,))
        return y

    @property
    def W_q(self) -> Tensor:
        """The same as `.weight`, under a name by which PEFT knows a layer that has `dequantize()`."""
        weight: Tensor = self.weight
        return weight

    def packed(self) -> PackedLayer:
        """The layer's parts as the kernels take them."""
        held = self._parameters
        try:
            # Eight times Module.__getattr__ would cost as much as the whole product of a small layer.
            parts = [held[name] for name in FORWARD_PARAMETERS]
        except KeyError:  # a wrapper (parametrizations, sharding) keeps them elsewhere
            parts = [self._held(name) for name in FORWARD_PARAMETERS]
        return PackedLayer._make((*parts, self.ranks))

    def paths(self) -> list[Path]:
        """The factors, with ±UNPACKED_LATENT for latents."""
        return unpack_paths(self.parts("weight", PACKED_PARTS), self.ranks)

    def unpack(self) -> LatentLittleBitLinear:
        """The trainable twin: same signs, same scales."""
        return self._twin(LatentLittleBitLinear, latent_parts(self.paths()))


class LatentLittleBitLinear(_FactoredLinear):
    """A linear layer on latents. `.weight` is U's latent, fp32 [out_features, sum_p r_p]; arguments as LittleBitLinear."""

    latent = True

    def forward(self, x: Tensor) -> Tensor:
        x = autocast_input(x)
        out = latent_product(x, self.parts("weight", LATENT_PARTS), self.ranks, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @property
    def W_q(self) -> Tensor:
        """Refuses adapters: PEFT asks every layer that it attaches one to for this. To others, nothing of the kind is here."""
        if asked_by_peft():
            raise ValueError(ADAPTED_LATENT)
        raise AttributeError("W_q")

    def paths(self) -> list[Path]:
        """The latents, with the scales rounded as in the forward."""
        return latent_paths(self.parts("weight", LATENT_PARTS), self.ranks, self.scale_dtype)

    def pack(self) -> LittleBitLinear:
        """The packed twin: the latents' signs, the scales rounded to `scale_dtype`."""
        return self._twin(LittleBitLinear, pack_parts(self.paths(), self.scale_dtype))


def latent_product(x: Tensor, parts: dict[str, Tensor], ranks: Sequence[int], layer: FactorModule) -> Tensor:
    """The layer's product on latent parts, in x's dtype; `layer` gives scale_dtype, sign_gradient and alpha."""
    gradient = SignGradient(layer.sign_gradient, layer.alpha)
    u, v, scale_out, scale_rank, scale_in = (parts[part] for part in LATENT_PARTS)
    return factored_product(x, u, v, scale_out, scale_rank, scale_in, tuple(ranks), layer.scale_dtype, gradient)
