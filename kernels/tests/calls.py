"""The product, its gradient and the products of several layers by one implementation, with a layer's fields written out."""

from typing import Any, List, Sequence

import torch
from hf_littlebit.kernels import PackedLayer


def linear(backend: Any, x: torch.Tensor, *layer: Any) -> torch.Tensor:
    """y of one layer, whose fields follow x in the order of `PackedLayer`."""
    return backend.products(x, (PackedLayer(*layer),))[0]


def linears(backend: Any, x: torch.Tensor, layers: Sequence[Sequence[Any]]) -> List[torch.Tensor]:
    """y of every layer, each a sequence of its fields."""
    return backend.products(x, [PackedLayer(*layer) for layer in layers])


def linear_grad(backend: Any, grad: torch.Tensor, *layer: Any) -> torch.Tensor:
    """The gradient of one layer with respect to x; of its fields the bias is left out."""
    *parts, ranks = layer
    return backend.products(grad, (PackedLayer(*parts, None, ranks),), True)[0]
