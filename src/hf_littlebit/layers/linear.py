"""The quantized linear layer, packed for inference and latent for training.

    y = sum_p h_p * (U_p (l_p * (V_p^T (g_p * x)))) + bias          (LittleBit, arXiv 2506.13771, eq. 5)

LittleBitLinear        U, V as bits (kernels/packing.py), h, l, g as 16-bit floats; all frozen, gradient for x and the bias.
LatentLittleBitLinear  U, V as fp32 latents whose sign is used, h, l, g as fp32 rounded to 16 bits in the forward; trainable.

Both are `nn.Linear`s whose `.weight` is their U: transformers without this plugin then meets a tensor of the wrong shape
and refuses the checkpoint, and PEFT attaches adapters as to any linear layer. `pack` and `unpack` are exact: the signs and
the rounded scales are the same on both sides, so packing what was unpacked gives the same bits.

The parts of one weight are parameters named after it, so that the 3-D weights of mixture-of-experts layers
(experts.py) can use the same functions: for the weight "weight" they are weight (U), weight_tail, v, v_tail, scale_out,
scale_rank and scale_in; for "gate_up_proj" they are gate_up_proj (U), gate_up_proj_tail, gate_up_proj_v, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..internals.transformers import marked_initialized
from ..kernels.packing import factor_shapes, pack_signs, unpack_signs
from . import ops
from .eager import repeated
from .latent_matmul import factored_product
from .path import Path, dense_weight
from .sign import ALPHA, SignGradient

__all__ = ["LatentLittleBitLinear", "LittleBitLinear", "autocast_input", "latent_parts", "pack_parts", "part_name"]

PACKED_PARTS = ("u", "u_tail", "v", "v_tail", "scale_out", "scale_rank", "scale_in")
LATENT_PARTS = ("u", "v", "scale_out", "scale_rank", "scale_in")
UNPACKED_LATENT = 0.02  # |latent| that `unpack` gives a bare sign: small enough for SmoothSign's gradient to move it


def part_name(weight: str, part: str) -> str:
    """The parameter that holds `part` of the weight called `weight` in its module."""
    if part == "u":
        return weight
    if part == "u_tail":
        return f"{weight}_tail"
    return part if weight == "weight" else f"{weight}_{part}"


FORWARD_PARAMETERS = (*(part_name("weight", part) for part in PACKED_PARTS), "bias")


def pack_parts(paths: Sequence[Path], scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Factors as the packed parts of packing.py, parts of zero rows left out (but for "u")."""
    rows = [pack_signs(path.u.T) for path in paths]
    words, tail = pack_signs(torch.cat([path.v for path in paths], dim=1))
    parts = {
        "u": torch.cat([row[0] for row in rows]),
        "u_tail": torch.cat([row[1] for row in rows]),
        "v": words,
        "v_tail": tail,
        "scale_out": torch.stack([path.scale_out for path in paths]).to(scale_dtype),
        "scale_rank": torch.cat([path.scale_rank for path in paths]).to(scale_dtype),
        "scale_in": torch.stack([path.scale_in for path in paths]).to(scale_dtype),
    }
    return {part: value for part, value in parts.items() if part == "u" or value.shape[0]}


def latent_parts(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Factors as fp32 latents: u [out, R] and v [in, R] with the paths side by side, scales as in packing.py."""
    parts = {
        "u": torch.cat([path.u for path in paths], dim=1),
        "v": torch.cat([path.v for path in paths], dim=1),
        "scale_out": torch.stack([path.scale_out for path in paths]),
        "scale_rank": torch.cat([path.scale_rank for path in paths]),
        "scale_in": torch.stack([path.scale_in for path in paths]),
    }
    # Contiguous: fused optimizers pair a parameter with its restored state by memory order.
    return {part: value.float().contiguous() for part, value in parts.items()}


def unpack_paths(parts: dict[str, Tensor | None], ranks: Sequence[int]) -> list[Path]:
    """Packed parts of one weight as factors, with ±UNPACKED_LATENT for latents and the stored scales in fp32."""
    u, u_tail, v, v_tail = (parts.get(part) for part in PACKED_PARTS[:4])
    h, l, g = (parts[part].float() for part in PACKED_PARTS[4:])  # type: ignore[union-attr]  # noqa: E741
    v_signs = unpack_signs(v, v_tail, g.shape[-1])
    paths, word, byte, column = [], 0, 0, 0
    for index, rank in enumerate(ranks):
        words, tail = rank // 32, rank % 32 // 8
        rows_tail = None if u_tail is None else u_tail[byte : byte + tail]
        u_signs = unpack_signs(u[word : word + words], rows_tail, rank)  # type: ignore[index]
        columns = slice(column, column + rank)
        latents = (UNPACKED_LATENT * u_signs.T.contiguous(), UNPACKED_LATENT * v_signs[:, columns].contiguous())
        paths.append(Path(*latents, h[index], l[columns], g[index]))
        word, byte, column = word + words, byte + tail, column + rank
    return paths


def latent_paths(parts: dict[str, Tensor], ranks: Sequence[int], scale_dtype: torch.dtype) -> list[Path]:
    """Latent parts of one weight as factors, with the scales rounded as in the forward."""
    u, v = (parts[part].detach().split(list(ranks), dim=-1) for part in LATENT_PARTS[:2])
    h, l, g = (parts[part].detach().to(scale_dtype).float() for part in LATENT_PARTS[2:])  # noqa: E741
    return [Path(*path) for path in zip(u, v, h, l.split(list(ranks)), g, strict=True)]


class FactorModule(nn.Module):
    """A module that holds the parts of one or more weights as parameters and keeps their dtypes whatever it is cast to."""

    scale_dtype: torch.dtype
    part_dtypes: dict[str, torch.dtype]  # of the declared parts, by parameter name

    def __init__(self, scale_dtype: torch.dtype):
        nn.Module.__init__(self)
        self.scale_dtype, self.part_dtypes = scale_dtype, {}

    def declare(
        self, weight: str, part: str, shape: Sequence[int], dtype: torch.dtype, device: Any, train: bool
    ) -> None:
        """Register an uninitialised parameter for one part of `weight`."""
        value = nn.Parameter(torch.empty(tuple(shape), dtype=dtype, device=device), requires_grad=train)
        self.register_parameter(part_name(weight, part), marked_initialized(value))
        self.part_dtypes[part_name(weight, part)] = dtype

    def declare_packed(
        self, weight: str, size: tuple[int, int], ranks: Sequence[int], device: Any, lead: tuple[int, ...] = ()
    ):
        """Register the packed parts of a weight of `size` (out, in); `lead` is (experts,) for a stack of weights."""
        shapes = factor_shapes(size[1], size[0], ranks, self.scale_dtype)
        for part in PACKED_PARTS:
            if part in shapes:
                shape, dtype = shapes[part]
                self.declare(weight, part, (*lead, *shape), dtype, device, train=False)
            else:
                self.register_parameter(part_name(weight, part), None)

    def declare_latent(
        self, weight: str, size: tuple[int, int], ranks: Sequence[int], device: Any, lead: tuple[int, ...] = ()
    ):
        """Register the latent parts of a weight of `size` (out, in), fp32 whatever the model's dtype."""
        total, paths = sum(ranks), len(ranks)
        shapes = ((size[0], total), (size[1], total), (paths, size[0]), (total,), (paths, size[1]))
        for part, shape in zip(LATENT_PARTS, shapes, strict=True):
            self.declare(weight, part, (*lead, *shape), torch.float32, device, train=True)

    def parts(self, weight: str, kinds: Sequence[str], index: int | None = None) -> dict[str, Any]:
        """{part: parameter or None} of `weight`, or of the `index`-th weight of a stack."""
        values = {part: getattr(self, part_name(weight, part)) for part in kinds}
        if index is None:
            return values
        return {part: None if value is None else value[index] for part, value in values.items()}

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

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in kept and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Some libraries cast parameters one by one (peft prepares a model for training so); the file holds 16 bits.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dtype in self.part_dtypes.items():
            value = destination.get(prefix + name)
            if value is not None and value.dtype != dtype and value.is_floating_point() == dtype.is_floating_point:
                destination[prefix + name] = value.to(dtype)


def autocast_input(x: Tensor) -> Tensor:
    """x as `nn.Linear` would take it: cast to the autocast dtype where autocast is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


class LittleBitLinear(FactorModule, nn.Linear):
    """A linear layer on packed bits. `.weight` is U's words, int32 [sum_p r_p // 32, out_features].

    Args:
        ranks: rank of each path.
        dtype: of the bias. scale_dtype: of h, l and g, whatever the model is cast to.

    The parts are uninitialised until they are loaded or filled. x [..., in_features] of fp32, bf16 or fp16.
    """

    group: Any = None  # a shared.SharedInput whose member `place` this layer is
    place = 0
    _repeated: Any = None  # an eager.Repeated of this layer alone

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
    ):
        FactorModule.__init__(self, scale_dtype)
        self.in_features, self.out_features, self.ranks = in_features, out_features, list(ranks)
        # First: transformers takes a model's dtype from its first floating parameter, which should not be a scale.
        self.register_parameter("bias", _bias(out_features, bias, device, dtype))
        self.declare_packed("weight", (out_features, in_features), ranks, device)

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
        *parts, bias = self.factors()
        y = ops.linear(x, parts, bias, self.ranks)
        if y.is_cuda and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            self._repeated = repeated(x, ((*parts, bias, self.ranks),), (self._parameters,))
        return y

    def factors(self) -> list[Tensor | None]:
        """The parts as `ops.linear` takes them, and the bias."""
        held = self._parameters
        try:
            # Eight times Module.__getattr__ would cost as much as the whole product of a small layer.
            return [held[name] for name in FORWARD_PARAMETERS]
        except KeyError:  # a wrapper (parametrizations, sharding) keeps them elsewhere
            return [getattr(self, name) for name in FORWARD_PARAMETERS]

    def paths(self) -> list[Path]:
        """The factors, with ±UNPACKED_LATENT for latents."""
        return unpack_paths(self.parts("weight", PACKED_PARTS), self.ranks)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight this layer stands for, [out_features, in_features]."""
        return dense_weight(self.paths()).to(dtype)

    def unpack(self) -> LatentLittleBitLinear:
        """The trainable twin: same signs, same scales."""
        twin = LatentLittleBitLinear(
            self.in_features, self.out_features, self.ranks, self.bias is not None, "meta", scale_dtype=self.scale_dtype
        )
        twin.fill("weight", latent_parts(self.paths()))
        twin.bias = self.bias
        return twin.train(self.training)

    def extra_repr(self) -> str:
        return _describe(self)


class LatentLittleBitLinear(FactorModule, nn.Linear):
    """A linear layer on latents. `.weight` is U's latent, fp32 [out_features, sum_p r_p]; arguments as LittleBitLinear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int],
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.bfloat16,
    ):
        FactorModule.__init__(self, scale_dtype)
        self.in_features, self.out_features, self.ranks = in_features, out_features, list(ranks)
        self.sign_gradient, self.alpha = "smooth", ALPHA
        self.register_parameter("bias", _bias(out_features, bias, device, dtype))
        self.declare_latent("weight", (out_features, in_features), ranks, device)

    def forward(self, x: Tensor) -> Tensor:
        x = autocast_input(x)
        out = latent_product(x, self.parts("weight", LATENT_PARTS), self.ranks, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def paths(self) -> list[Path]:
        """The latents, with the scales rounded as in the forward."""
        return latent_paths(self.parts("weight", LATENT_PARTS), self.ranks, self.scale_dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight this layer stands for, [out_features, in_features]."""
        return dense_weight(self.paths()).to(dtype)

    def pack(self) -> LittleBitLinear:
        """The packed twin: the latents' signs, the scales rounded to `scale_dtype`."""
        twin = LittleBitLinear(
            self.in_features, self.out_features, self.ranks, self.bias is not None, "meta", scale_dtype=self.scale_dtype
        )
        twin.fill("weight", pack_parts(self.paths(), self.scale_dtype))
        twin.bias = self.bias
        return twin.train(self.training)

    def extra_repr(self) -> str:
        return _describe(self)


def latent_product(x: Tensor, parts: dict[str, Tensor], ranks: Sequence[int], layer: Any) -> Tensor:
    """The layer's product on latent parts, in x's dtype; `layer` gives scale_dtype, sign_gradient and alpha."""
    gradient = SignGradient(layer.sign_gradient, layer.alpha)
    u, v, h, l, g = (parts[part] for part in LATENT_PARTS)  # noqa: E741
    return factored_product(x, u, v, h, l, g, tuple(ranks), layer.scale_dtype, gradient)


def _bias(size: int, bias: bool, device: Any, dtype: torch.dtype | None) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if bias else None


def _describe(layer: Any) -> str:
    return f"in_features={layer.in_features}, out_features={layer.out_features}, ranks={layer.ranks}, bias={layer.bias is not None}"
