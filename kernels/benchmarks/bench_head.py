"""The output head of 8 and 4 bits on a GPU against cuBLAS: `python kernels/benchmarks/bench_head.py [--out FILE]`.

For every shape, bits and batch: is the product right (against fp64, bf16 in and out)? Then the packed heads and torch's bf16
linear are captured in CUDA graphs of several calls, each with a table that has left the caches, the graphs take turns, and the
medians of one run are compared. Afterwards, while `--seconds` last, other tiles of one token are tried at the first shape, where
the project's mark is: 1.8 times cuBLAS with 8 bits. Prints a table, then one line of JSON; `--out` also writes it.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import torch
from hf_littlebit.kernels import gpu, table, table_gpu
from record import Record
from turns import MOST, turns

from hf_littlebit.report.bench.machine import machine

SHAPES = ((128256, 4096), (128256, 2048), (32000, 4096))  # rows, columns
BATCHES = (1, 4, 16, 64)  # tokens
MARK = (128256, 4096, 1, 8, 1.8)  # rows, columns, batch, bits, times as fast as cuBLAS
COLD = 256 << 20  # bytes of tables that are rotated: several times the L2 cache
LIMIT = 5e-3  # of the error's norm, relative to the result's: bf16 out
STEP = 1 << 14  # rows at a time of the exact product
# Rows, warps, stages of one token that are tried, for each number of bits.
ONES = {
    8: [(8, 4, 1), (16, 2, 1), (16, 1, 1), (32, 4, 1), (16, 4, 3), (8, 1, 1), (16, 4, 1)],
    4: [(4, 4, 1), (16, 4, 1), (8, 2, 1), (8, 1, 1), (8, 4, 1)],
}
DEVICE = "cuda"


def random_table(rows: int, columns: int, bits: int) -> table.PackedTable:
    """Random codes and scales of either sign, so that results are near 1."""
    shapes = table.table_shapes(rows, columns, bits)
    (shape, dtype), (scale_shape, scale_dtype) = shapes["codes"], shapes["scale"]
    least, end = (-127, 128) if bits == 8 else (-(2**31), 2**31)
    codes = torch.randint(least, end, shape, device=DEVICE, dtype=torch.int64 if bits == 4 else dtype).to(dtype)
    scale = torch.randn(scale_shape, device=DEVICE) / (end if bits == 8 else 8) / columns**0.5
    return table.PackedTable(codes, scale.to(scale_dtype), columns)


@functools.lru_cache(maxsize=None)
def copies(rows: int, columns: int, bits: int) -> List[Any]:
    """Enough tables (bits 16: dense bf16 weights) that going through all leaves none in the cache."""
    count = min(MOST, 1 + COLD // (rows * columns * bits // 8))
    if bits == 16:
        return [torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)]
    return [random_table(rows, columns, bits) for _ in range(count)]


def call(rows: int, columns: int, bits: int, x: torch.Tensor) -> Callable[[int], torch.Tensor]:
    held = copies(rows, columns, bits)
    if bits == 16:
        return lambda index: torch.nn.functional.linear(x, held[index % len(held)])
    return lambda index: table_gpu.head(x, *held[index % len(held)][:2])


def error(rows: int, columns: int, bits: int, x: torch.Tensor) -> float:
    """Of the result's norm, against fp64."""
    packed, found = copies(rows, columns, bits)[0], call(rows, columns, bits, x)(0)
    off = size = 0.0
    for first in range(0, rows, STEP):
        part = slice(first, first + STEP)
        whole = table.unpack_codes(packed.codes[part], columns).double()
        scale = packed.scale[part].double()
        wide = scale if scale.shape[1] == 1 else scale.repeat_interleave(table.GROUP, dim=1)[:, :columns]
        exact = x.double() @ (whole * wide).T
        off += (found[:, part].double() - exact).square().sum().item()
        size += exact.square().sum().item()
    return (off / size) ** 0.5


def measure(rows: int, columns: int, batch: int, rounds: int, record: Record) -> List[Dict[str, Any]]:
    x = torch.randn(batch, columns, device=DEVICE, dtype=torch.bfloat16)
    wrong = {bits: error(rows, columns, bits, x) for bits in table.BITS}
    for bits, found in wrong.items():
        if not found < LIMIT:
            what = f"{rows}x{columns} batch {batch}, {bits} bits"
            record.failures.append({"what": what, "error": f"the product is wrong by {found:.1e}, limit {LIMIT}"})
    times = turns({str(bits): call(rows, columns, bits, x) for bits in (16, *table.BITS)}, rounds)
    made = []
    for bits in table.BITS:
        bytes_read = sum(part.nbytes for part in copies(rows, columns, bits)[0][:2])
        row = {"rows": rows, "columns": columns, "batch": batch, "bits": bits, "error": wrong[bits]}
        row.update(
            us=round(times[str(bits)], 2),
            bf16_us=round(times["16"], 2),
            x_bf16=round(times["16"] / times[str(bits)], 2),
        )
        row.update(
            gb_s=round(bytes_read / times[str(bits)] / 1e3), bf16_gb_s=round(2 * rows * columns / times["16"] / 1e3)
        )
        made.append(row)
    return made


def try_ones(rows: int, columns: int, bits: int, rounds: int, record: Record) -> List[Tuple[Any, float]]:
    """[(tile of ONES, microseconds of one token)], the fastest first; those that time is left for."""
    x = torch.randn(1, columns, device=DEVICE, dtype=torch.bfloat16)
    run, usual = call(rows, columns, bits, x), table_gpu.one_tile
    found = []
    for one in ONES[bits]:
        if one[1] * table_gpu.WIDTH[bits] > columns:
            continue
        table_gpu.one_tile = lambda *_, one=one: table_gpu.One(*one)
        times = record.attempt(f"{bits} bits, {one}", lambda: turns({"one": run}, rounds))
        if times:
            found.append((one, round(times["one"], 2)))
    table_gpu.one_tile = usual
    return sorted(found, key=lambda pair: pair[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{rows}x{columns}" for rows, columns in SHAPES], help="rows x columns"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="numbers of tokens")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=30, help="begin no row after so many")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not gpu.load():
        print("this measures a CUDA or ROCm GPU with triton, and there is none", file=sys.stderr)
        return 1
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in options.shapes]
    record = Record("head-gpu", options.out, {"machine": machine(DEVICE)}, options.seconds)
    print(f"{record.document['machine']['device']}; times in µs, ratios: how many times faster than bf16")
    print("  rows x columns  batch  bits      time      bf16   x bf16    GB/s  bf16 GB/s    error")
    with torch.inference_mode():
        for rows, columns in shapes:
            for batch in options.batches:
                what = f"{rows}x{columns} batch {batch}"
                for row in record.attempt(what, lambda: measure(rows, columns, batch, options.rounds, record)) or ():  # noqa: B023
                    show(row)
                    record.add(row)
            copies.cache_clear()
        for bits in table.BITS:
            tiles = record.document.setdefault("tiles", {})[bits] = try_ones(*shapes[0], bits, options.rounds, record)
            print(f"one token, {bits} bits, ((rows, warps, stages), µs): {tiles}", flush=True)
    marked = [row for row in record.rows if (row["rows"], row["columns"], row["batch"], row["bits"]) == MARK[:4]]
    record.document["marks"] = [
        {"mark": MARK[4], "x_bf16": row["x_bf16"], "met": row["x_bf16"] >= MARK[4]} for row in marked
    ]
    return record.finish()


def show(row: Dict[str, Any]) -> None:
    print(
        f"{row['rows']:7}x{row['columns']:<6}{row['batch']:8}{row['bits']:6}{row['us']:10.1f}{row['bf16_us']:10.1f}"
        f"{row['x_bf16']:8.2f}x{row['gb_s']:8}{row['bf16_gb_s']:11}   {row['error']:.0e}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
