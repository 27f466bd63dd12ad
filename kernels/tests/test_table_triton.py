"""The Triton kernels of packed tables where there may be no GPU: interpreted, and compiled ahead of time for two vendors."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from hf_littlebit.kernels import gpu, table, table_gpu
from test_triton import (
    SHARED,
    build,  # noqa: F401  a fixture
    compiles,
    has_gpu,
    interprets,
    needs_triton,
    python,
    vendor,  # noqa: F401  a fixture
)

CASES = Path(__file__).with_name("table_cases.py")


def run_cases(**variables):
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = python("-m", "pytest", *options, str(CASES), **variables)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.subprocess
@interprets
def test_the_cases_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.subprocess
@needs_triton
@pytest.mark.skipif(not has_gpu, reason="no GPU")
def test_the_cases_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


@pytest.fixture
def launched(monkeypatch, vendor):  # noqa: F811
    """A function that calls table_gpu.py with tensors of no memory and returns what it would launch on an H200, or for AMD."""
    import triton

    found = []
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    monkeypatch.setattr(gpu, "on", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(table_gpu, "cores", lambda device: 132)
    monkeypatch.setattr(table_gpu, "shared_memory", lambda device: SHARED[vendor])
    monkeypatch.setattr(
        triton.runtime.JITFunction,
        "run",
        lambda self, *arguments, grid, warmup, **options: found.append((self, arguments, options)),
    )

    def launch(rows, columns, bits, grouped, tokens, dtype, what="head"):
        found.clear()
        shapes = table.table_shapes(rows, columns, bits, grouped)
        codes, scale = (torch.empty(shape, dtype=kind, device="meta") for shape, kind in shapes.values())
        if what == "head":
            table_gpu.head(torch.empty(tokens, columns, dtype=dtype, device="meta"), codes, scale)
        elif what == "gradient":
            table_gpu.head_grad(torch.empty(tokens, rows, dtype=dtype, device="meta"), codes, scale, columns)
        else:
            indices = torch.empty(tokens, dtype=torch.int64, device="meta")
            table_gpu.embedding(indices, codes, scale, columns, dtype)
        return list(found)

    return launch


@pytest.mark.slow
@needs_triton
@compiles
@pytest.mark.parametrize(
    "bits, grouped, rows, columns, dtype",
    [
        (8, False, 128256, 4096, torch.bfloat16),
        (8, True, 128256, 4096, torch.bfloat16),
        (4, None, 128256, 4096, torch.bfloat16),
        (8, False, 32000, 2048, torch.float32),
        (4, None, 32000, 2048, torch.float32),
        (8, False, 1003, 130, torch.float16),
        (4, None, 49152, 576, torch.float16),
    ],
    ids=str,
)
def test_one_token(launched, build, vendor, bits, grouped, rows, columns, dtype):  # noqa: F811
    """No spills; and where the columns allow it, x and codes are multiplied in the layout in which they are loaded."""
    ((kernel, arguments, options),) = launched(rows, columns, bits, grouped, 1, dtype)
    compiled = build(kernel, arguments, options)
    assert kernel.fn.__name__ == f"one{bits}"
    if vendor == "nvidia" and columns == 4096:
        assert compiled.metadata.shared <= 512  # where the warps meet, at the end
        width = "v4" if bits == 4 else "v2"
        assert re.search(rf"ld.global\S*\.{width}\.b32", compiled.asm["ptx"])


@pytest.mark.slow
@needs_triton
@compiles
@pytest.mark.parametrize(
    "bits, grouped, tokens, dtype, what",
    [
        (8, False, 4, torch.bfloat16, "head"),
        (8, False, 64, torch.float32, "head"),
        (8, False, 2048, torch.bfloat16, "head"),
        (8, True, 64, torch.bfloat16, "head"),
        (4, None, 4, torch.float16, "head"),
        (4, None, 64, torch.float32, "head"),
        (4, None, 2048, torch.bfloat16, "head"),
        (8, False, 16, torch.bfloat16, "gradient"),
        (4, None, 512, torch.float32, "gradient"),
        (4, None, 16, torch.bfloat16, "embedding"),
    ],
    ids=str,
)
def test_several_tokens(launched, build, vendor, bits, grouped, tokens, dtype, what):  # noqa: F811
    ((kernel, arguments, options),) = launched(128256, 4096, bits, grouped, tokens, dtype, what)
    compiled = build(kernel, arguments, options)
    if vendor == "nvidia" and what == "head":
        assert "wgmma.mma_async" in compiled.asm["ptx"]
