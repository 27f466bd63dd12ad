"""Checkpoints in the layouts of other programs, written from the layouts' descriptions in numpy, and their weights in fp64.

Nothing here is shared with the importer: bits are set one by one, and a layer's weight is the sum that its program's own
forward makes. Real checkpoints were not at hand.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SCALE_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def words(signs: np.ndarray) -> torch.Tensor:
    """int32 [rows, ceil(columns / 32)], bit c % 32 of word c // 32 is set for -1."""
    rows, columns = signs.shape
    packed = np.zeros((rows, -(-columns // 32)), dtype=np.uint32)
    for column in range(columns):
        packed[:, column // 32] |= (signs[:, column] < 0).astype(np.uint32) << np.uint32(column % 32)
    return torch.from_numpy(packed.view(np.int32).copy())


def bits(signs: np.ndarray) -> torch.Tensor:
    """uint8 of the whole matrix as one row, the most significant bit first, set for +1; padded with +1."""
    flat = [int(sign > 0) for sign in signs.ravel()]
    flat += [1] * (-len(flat) % 8)
    return torch.tensor(
        [sum(bit << (7 - place) for place, bit in enumerate(flat[at : at + 8])) for at in range(0, len(flat), 8)],
        dtype=torch.uint8,
    )


@dataclass
class Maker:
    """Random vectors and sign matrices, the same for the same seed."""

    random: np.random.Generator
    dtype: torch.dtype
    mean: float = 0.2
    made: list = field(default_factory=list)

    def scales(self, length: int) -> torch.Tensor:
        values = torch.from_numpy(self.random.normal(self.mean, 0.1, length)).to(self.dtype)
        return torch.where(values == 0, torch.ones_like(values), values)

    def signs(self, rows: int, columns: int) -> np.ndarray:
        return self.random.choice([-1, 1], (rows, columns))


def exact(value: torch.Tensor) -> np.ndarray:
    return value.double().numpy().ravel()


def product(h: torch.Tensor, u: np.ndarray, l: np.ndarray, v: np.ndarray, g: torch.Tensor) -> np.ndarray:  # noqa: E741
    return exact(h)[:, None] * (u.astype(np.float64) * l @ v.astype(np.float64)) * exact(g)


def littlebit(make: Maker, name: str, out: int, into: int, rank: int, paths: int = 2, spelling: str = "{}{}_{}"):
    """({tensor: value}, weight) of a layer of LittleBit; `spelling` says where the second path's "_R" stands."""
    tensors, weight = {}, np.zeros((out, into))
    for end in ("", "_R")[:paths]:
        u, v = make.signs(out, rank), make.signs(rank, into)
        u1, u2, v1, v2 = (make.scales(length) for length in (out, rank, rank, into))
        weight += product(u1, u, exact(u2) * exact(v1), v, v2)
        for side, matrix in (("U", u), ("V", v)):
            tensors[f"{name}." + spelling.format(side, end, "packed")] = words(matrix)
            tensors[f"{name}." + spelling.format(side, end, "shape")] = torch.tensor(matrix.shape)
        # As its parameters are: [1, length].
        tensors |= {f"{name}.{key}{end}": x[None] for key, x in (("u1", u1), ("u2", u2), ("v1", v1), ("v2", v2))}
    tensors[f"{name}._eff_bit_target"] = torch.tensor(0.55)
    return tensors, weight


def nanoquant(make: Maker, name: str, out: int, into: int, rank: int, mid: bool = True, shapes: bool = True):
    u, v = make.signs(out, rank), make.signs(rank, into)
    post, pre, middle = make.scales(out), make.scales(into), make.scales(rank)
    tensors = {f"{name}.U_packed": words(u), f"{name}.V_packed": words(v)}
    tensors |= {f"{name}.scale_post": post, f"{name}.scale_pre": pre}
    if shapes:
        tensors |= {f"{name}.U_shape": torch.tensor(u.shape), f"{name}.V_shape": torch.tensor(v.shape)}
    if mid:
        tensors[f"{name}.scale_mid"] = middle
    return tensors, product(post, u, exact(middle) if mid else np.ones(rank), v, pre)


def dbf(make: Maker, name: str, out: int, into: int, rank: int):
    b1, b3 = make.signs(rank, into), make.signs(out, rank)
    w0, w2, w4 = make.scales(into), make.scales(rank), make.scales(out)
    tensors = {"0.w": w0, "1.bp": bits(b1), "2.w": w2, "3.bp": bits(b3), "4.w": w4}
    return {f"{name}.{key}": x for key, x in tensors.items()}, product(w4, b3, exact(w2), b1, w0)


def onecompression(make: Maker, name: str, out: int, into: int, rank: int):
    b1, b3 = make.signs(rank, into), make.signs(out, rank)
    s0, s2, s4 = make.scales(into), make.scales(rank), make.scales(out)
    tensors = {"scaling0": s0, "bp1": bits(b1), "scaling2": s2, "bp3": bits(b3), "scaling4": s4}
    return {f"{name}.{key}": x for key, x in tensors.items()}, product(s4, b3, exact(s2), b1, s0)


def i32(make: Maker, name: str, out: int, into: int, rank: int):
    """In the layout's own names: blocks are counted as "blocks.0", whatever the model calls them."""
    u, v = make.signs(out, rank), make.signs(rank, into)
    post, pre, mid = make.scales(out), make.scales(into), make.scales(rank)
    name = "layouts.llama.cpp-i32-lsb-v1." + name.replace("model.layers.", "blocks.")
    tensors = {"factor_left_words": words(u), "factor_right_words": words(v)}
    tensors |= {"scale_post": post, "scale_mid": mid, "scale_pre": pre}
    return {f"{name}.{key}": x for key, x in tensors.items()}, product(post, u, exact(mid), v, pre)


def i32_sidecars(make: Maker, name: str, out: int, into: int, rank: int):
    """The same in the names of the files that llama.cpp's converter makes."""
    tensors, weight = i32(make, name, out, into, rank)
    ends = {"factor_left_words": "nq_u", "factor_right_words": "nq_v"}
    ends |= {f"scale_{end}": f"nq_scale_{end}" for end in ("pre", "mid", "post")}
    return {f"{name}.{ends[key.rpartition('.')[2]]}": value for key, value in tensors.items()}, weight


LAYOUTS: dict[str, Callable] = {
    "littlebit": littlebit,
    "nanoquant": nanoquant,
    "dbf": dbf,
    "onecompression-dbf": onecompression,
    "llama.cpp-i32-lsb-v1": i32,
}


def write(
    model, folder: Path, layer: Callable, dtype: str = "bf16", rank: int = 13, skip: tuple[str, ...] = ("lm_head",)
):
    """Write `model` to `folder` with every linear layer but `skip` in the layout of `layer`; {layer: its weight in fp64}."""
    folder.mkdir(parents=True, exist_ok=True)
    make = Maker(np.random.default_rng(0), SCALE_DTYPES[dtype])
    state, weights, tensors = model.state_dict(), {}, {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and not name.endswith(skip):
            packed, weights[name] = layer(make, name, module.out_features, module.in_features, rank + len(weights) % 5)
            tensors |= packed
            del state[f"{name}.weight"]
    first = {value.data_ptr(): name for name, value in reversed(state.items())}  # of tensors that are tied
    tensors |= {name: value for name, value in state.items() if first[value.data_ptr()] == name}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    if layer is littlebit:
        settings = {"quant_func": "STEBinary", "eff_bit": 0.55, "residual": True, "split_dim": 1024, "kv_factor": 1.0}
        (folder / "littlebit_config.json").write_text(json.dumps(settings))
    return weights
