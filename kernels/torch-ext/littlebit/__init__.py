"""littlebit: matrix products with packed binary factors, W ~ sum_p diag(h_p) U_p diag(l_p) V_p^T diag(g_p).

The public functions take and return tensors and know nothing of transformers. `packing` is the layout (the file format),
`reference` the product in plain torch.
"""

from . import packing, reference
from .packing import LAYOUT_VERSION, factor_shape, factor_shapes, pack_signs, stored_bits, unpack_signs
from .reference import littlebit_linear, littlebit_linear_grad

__all__ = [
    "LAYOUT_VERSION",
    "factor_shape",
    "factor_shapes",
    "littlebit_linear",
    "littlebit_linear_grad",
    "pack_signs",
    "packing",
    "reference",
    "stored_bits",
    "unpack_signs",
]
