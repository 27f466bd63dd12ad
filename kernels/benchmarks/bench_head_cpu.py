"""The output head of 8 and 4 bits on a CPU: `python kernels/benchmarks/bench_head_cpu.py [--threads 1] [--rounds 8] [--out FILE]`.

For every shape and batch: is the product right (against fp64)? Then the packed heads and torch's bf16 linear take turns, each with
tables that have left the caches, and the medians of one run are compared. A head reads its whole table once, so the columns
`x bound` say how many times faster it is than the time in which this machine's memory, as measured here, delivers the bf16 table.
Prints a table, then one line of JSON; `--out` also writes it.
"""

import sys
from typing import Any, Dict, List

import torch
from cpu_run import Candidates, CpuRun, option_parser, turns
from hf_littlebit.kernels import table, table_cpu

SHAPES = ((32000, 4096), (128256, 2048))  # rows, columns
BATCHES = (1, 2, 4, 16)  # tokens
MARKS = {
    (8, 1): 1.9,
    (4, 1): 3.4,
    (8, 16): 1.0,
    (4, 16): 1.0,
}  # (bits, batch): times as fast as torch's bf16, one thread
LIMIT = 1e-6  # of an fp32 product's error, relative to the sum of magnitudes
STEP = 1 << 12  # rows at a time of the exact product


def random_table(rows: int, columns: int, bits: int) -> table.PackedTable:
    """Random codes and scales of either sign."""
    shapes = table.table_shapes(rows, columns, bits)
    (shape, dtype), (scale_shape, scale_dtype) = shapes["codes"], shapes["scale"]
    least, end = (-127, 128) if bits == 8 else (-(2**31), 2**31)
    codes = torch.randint(least, end, shape, dtype=dtype)
    return table.PackedTable(codes, torch.randn(scale_shape).to(scale_dtype), columns)


def error(packed: table.PackedTable, x: torch.Tensor) -> float:
    """Of the product of bf16 x in fp32's terms: what is left after one rounding to bf16, relative to the sum of magnitudes."""
    worst = 0.0
    y = table_cpu.head(x, *packed[:2]).double()
    for first in range(0, packed.codes.shape[0], STEP):
        part = slice(first, first + STEP)
        whole, scale = table.unpack_codes(packed.codes[part], packed.columns).double(), packed.scale[part].double()
        wide = scale if scale.shape[1] == 1 else scale.repeat_interleave(table.GROUP, dim=1)[:, : packed.columns]
        rows = (whole * wide).T
        exact, size = x.double() @ rows, x.double().abs() @ rows.abs()
        worst = max(worst, (((y[:, part] - exact).abs() - 2**-8 * exact.abs()) / size).max().item())
    return worst


def measure(rows: int, columns: int, limit: float, rounds: int) -> List[Dict[str, Any]]:
    dense = torch.randn(rows, columns).bfloat16()
    packed = {bits: random_table(rows, columns, bits) for bits in table.BITS}
    made = []
    for batch in BATCHES:
        x = torch.randn(batch, columns).bfloat16()
        wrong = {bits: error(packed[bits], x) for bits in table.BITS}
        candidates: Candidates = {"16": lambda _, x=x: torch.nn.functional.linear(x, dense)}
        for bits in table.BITS:
            candidates[str(bits)] = lambda _, x=x, parts=packed[bits][:2]: table_cpu.head(x, *parts)
        times = turns(candidates, rounds)
        for bits in table.BITS:
            assert wrong[bits] < LIMIT, (
                f"{rows}x{columns}, {bits} bits, batch {batch}: error {wrong[bits]:.1e}, limit {LIMIT}"
            )
            seconds = times[str(bits)]
            row = {"rows": rows, "columns": columns, "batch": batch, "bits": bits, "error": wrong[bits]}
            row.update(
                us=round(seconds * 1e6, 1), bf16_us=round(times["16"] * 1e6, 1), x_bf16=round(times["16"] / seconds, 2)
            )
            row.update(x_bound=round(2 * rows * columns / limit / seconds, 2))
            row.update(gb_s=round(sum(part.nbytes for part in packed[bits][:2]) / seconds / 1e9, 1))
            print(
                f"{rows:7}x{columns:<6}{batch:7}{bits:6}{row['us']:10.0f}{row['bf16_us']:10.0f}{row['x_bf16']:8.2f}x"
                f"{row['x_bound']:8.2f}x{row['gb_s']:8.1f}   {max(0.0, wrong[bits]):.0e}",
                flush=True,
            )
            made.append(row)
    return made


def main() -> int:
    parser = option_parser(__doc__.split("\n")[0], rounds=8)
    parser.add_argument(
        "--shapes", nargs="+", default=[f"{rows}x{columns}" for rows, columns in SHAPES], help="rows x columns"
    )
    run = CpuRun("head-cpu", parser.parse_args())
    options = run.options
    print("  rows x columns batch  bits      time      bf16   x bf16  x bound    GB/s   error")
    rows = []
    with torch.inference_mode():
        for shape in options.shapes:
            rows += measure(*map(int, shape.split("x")), run.limit, options.rounds)
    missed = [
        f"{row['rows']}x{row['columns']} batch {row['batch']}, {row['bits']} bits: {row['x_bf16']}"
        for row in rows
        if options.threads == 1 and row["x_bf16"] < MARKS.get((row["bits"], row["batch"]), 0)
    ]
    return run.finish(rows, missed)


if __name__ == "__main__":
    sys.exit(main())
