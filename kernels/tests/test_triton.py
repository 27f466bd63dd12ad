"""The Triton kernels where there may be no GPU: interpreted, compiled ahead of time for two vendors, and their dispatch.

The cases themselves are in triton_cases.py and run in a process of their own.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import linear, linear_grad, linears
from hf_littlebit.kernels import PARTS, factor_shapes, gpu

CASES = Path(__file__).with_name("triton_cases.py")
FILES = (CASES, CASES.with_name("triton_cases_groups.py"))
found = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not found, reason="triton is not installed")
recent = found and tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 7)
interprets = pytest.mark.skipif(not recent, reason="triton is not installed, or is older than 3.7 and cannot interpret")
has_gpu = any(getattr(torch, kind).is_available() for kind in gpu.DEVICES)
compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
)
STAGES = {"nvidia": ["stage_one", "stage_two"], "amd": ["_stage_one", "_stage_two"]}  # decode.py, gemv.py
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int64: "*i64",
}


def python(*arguments, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=CASES.parent
    )


def run_cases(**variables):
    options = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = python("-m", "pytest", *options, *map(str, FILES), **variables, LITTLEBIT_BACKEND="triton")
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


# Bytes of shared memory: what an AMD compute unit has, what every NVIDIA GPU since Ampere lets a program take.
SHARED = {"amd": 64 << 10, "nvidia": 99 << 10}


@pytest.fixture(params=["nvidia", "amd"])
def vendor(request):
    return request.param


@pytest.fixture
def launches(monkeypatch, vendor):
    """A function that calls gpu.py on CPU tensors and returns the launches that it would do on an H200, or for AMD."""
    import triton
    from hf_littlebit.kernels import dense, gemm, tuning

    found = []
    for module in (gpu, gemm):
        monkeypatch.setattr(module, "abilities", lambda device: (vendor == "nvidia",) * 2)
    monkeypatch.setattr(tuning, "multiplies_bf16", lambda device: vendor == "nvidia")
    monkeypatch.setattr(tuning, "shared_memory", lambda device: SHARED[vendor])
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    monkeypatch.setattr(tuning, "cores", lambda device: 132)
    monkeypatch.setattr(dense.Dense, "__call__", lambda *_: None)
    monkeypatch.setattr(
        triton.runtime.JITFunction,
        "run",
        lambda self, *arguments, grid, warmup, **options: found.append((self, arguments, options)),
    )

    def forget():
        for cached in (tuning.decode, tuning.decode_group, tuning.few, tuning.tiles):
            cached.cache_clear()

    def launch(shapes, tokens, dtype, gradient=False):
        found.clear()
        forget()
        layers = []
        for out, into, ranks in shapes:
            parts = {
                name: torch.empty(size, dtype=kind) for name, (size, kind) in factor_shapes(into, out, ranks).items()
            }
            layers.append([*map(parts.get, PARTS), torch.empty(out, dtype=dtype), ranks])
        x = torch.empty(tokens, shapes[0][0 if gradient else 1], dtype=dtype)
        if gradient:
            linear_grad(gpu, x, *layers[0][:7], layers[0][8])
        elif len(layers) == 1:
            linear(gpu, x, *layers[0])
        else:
            linears(gpu, x, layers)
        return list(found)

    yield launch
    forget()


def described(value, place, constants, hints, aligned=True):
    """A launch argument's type as triton writes it; what it would specialize on goes into constants and hints."""
    if isinstance(value, tuple):
        return tuple(described(item, (*place, i), constants, hints, aligned) for i, item in enumerate(value))
    if value is None or (aligned and isinstance(value, int) and value == 1):
        constants[place] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or (aligned and value % 16 == 0):
        hints[place] = [["tt.divisibility", 16]]
    return POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"


def compile_ahead(kernel, arguments, options, target):
    """What the launch would compile for `target`, without a device."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        if index < len(arguments):
            aligned = not parameter.do_not_specialize
            signature[parameter.name] = described(arguments[index], (index,), constants, hints, aligned)
        else:
            signature[parameter.name], constants[(index,)] = "constexpr", options[parameter.name]
    wanted = {name: value for name, value in options.items() if name.startswith("num_")}
    return triton.compile(ASTSource(kernel, signature, constants, hints), target=target, options=wanted)


def resources(compiled, folder):
    """(registers, bytes of stack) a thread, by NVIDIA's own tool, which comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    done = subprocess.run([tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", done.stdout).groups()))


@pytest.fixture
def build(vendor, tmp_path, monkeypatch):
    """A function that compiles a launch for a vendor's GPU; a program must fit, and may spill `stack` bytes a thread."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    nvidia = vendor == "nvidia"
    target = GPUTarget("cuda", 90, 32) if nvidia else GPUTarget("hip", "gfx942", 64)

    def build(kernel, arguments, options, stack=0):
        compiled = compile_ahead(kernel, arguments, options, target)
        assert compiled.metadata.shared <= SHARED[vendor]
        if nvidia:
            registers, spilled = resources(compiled, tmp_path)
            print(
                f"{kernel.fn.__name__} {options}: {registers} registers, {spilled} B stack, {compiled.metadata.shared} B shared"
            )
            assert spilled <= stack, "registers are spilled"
        return compiled

    return build


def advice(compiled, folder):
    """What NVIDIA's assembler says about a kernel."""
    from triton.backends.nvidia.compiler import get_ptxas

    (folder / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "--gpu-name=sm_90a", "-v", folder / "kernel.ptx", "-o", folder / "kernel.out"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.slow
@needs_triton
@compiles
@pytest.mark.parametrize(
    "shape, tokens, dtype, gradient",
    [
        ((8192, 28672, (296, 296)), 1, torch.bfloat16, False),
        ((1024, 4096, (352, 352)), 1, torch.float16, False),
        ((4096, 4096, (104, 104)), 16, torch.bfloat16, False),
        ((4096, 4096, (968, 968)), 512, torch.bfloat16, False),
        ((8192, 28672, (1728, 1728)), 2048, torch.bfloat16, False),
        ((4096, 4096, (104, 104)), 512, torch.float32, False),
        ((4096, 4096, (104, 104)), 512, torch.bfloat16, True),
        ((129, 257, (33, 7, 64)), 7, torch.float32, True),
        ((129, 257, (33, 7, 64)), 3, torch.float32, False),
    ],
    ids=str,
)
def test_kernels_compile_without_a_gpu(launches, build, vendor, tmp_path, shape, tokens, dtype, gradient):
    from hf_littlebit.kernels import tuning

    found = launches([shape], tokens, dtype, gradient)
    names = [kernel.fn.__name__ for kernel, _, _ in found]
    decode = tokens <= gpu.DECODE and not gradient
    products = [name for name in names if name not in ("tail_rows", "combine", "finish")]
    many = ["scale", "_unpack"] if tokens > tuning.MANY else ["scale", "expand", "contract"]
    assert list(dict.fromkeys(products)) == (STAGES[vendor] if decode else many)
    for launch in found:
        compiled = build(*launch)
        if vendor == "nvidia" and launch[0].fn.__name__ in ("expand", "contract"):
            # Signs go from registers to the matrix units, and none of those waits for the instruction before it.
            assert re.search(r"wgmma.mma_async.*\}, \{%r\d+", compiled.asm["ptx"])
            assert "are serialized" not in advice(compiled, tmp_path)
            # Nothing runs on into the next step, whose signs would take the registers that it still reads.
            assert set(re.findall(r"wgmma.wait_group.sync.aligned (\d+)", compiled.asm["ptx"])) == {"0"}


def reductions(compiled):
    """The layout, element by element and thread by thread, of every sum: its order follows from nothing else."""
    text = compiled.asm["ttgir"]
    named = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    found = re.findall(r"\}\) : \((tensor<[^)]*)\) -> ", text)
    return [re.sub(r"#\w+", lambda name: named.get(name[0], name[0]), layout) for layout in found]


@pytest.mark.slow
@needs_triton
@compiles
@pytest.mark.parametrize(
    "shapes",
    [
        [(4096, 4096, (80, 80)), (1024, 4096, (24, 24)), (1024, 4096, (24, 24))],
        [(11008, 4096, (128, 128)), (11008, 4096, (128, 128))],
        [(129, 256, (33, 7, 64)), (1, 256, (8,)), (96, 256, (64, 64))],
    ],
    ids=str,
)
def test_layers_that_read_the_same_x_compile_as_one(launches, build, vendor, monkeypatch, shapes):
    from hf_littlebit.kernels import tuning

    together = launches(shapes, 1, torch.bfloat16)
    assert [kernel.fn.__name__ for kernel, _, _ in together] == STAGES[vendor]
    outs, ranks = tuple(shape[0] for shape in shapes), tuple(shape[2] for shape in shapes)
    for choice, rule in (("few", "_few_rule"), ("decode_group", "_decode_rule")):
        config = getattr(tuning, choice)(torch.device("cpu"), outs, shapes[0][1], ranks)
        monkeypatch.setattr(tuning, rule, lambda *_, config=config: config)
    alone = [launches([shape], 1, torch.bfloat16) for shape in shapes]
    for stage, launch in enumerate(together):
        each = [layout for layer in alone for layout in reductions(build(*layer[stage]))]
        assert each and reductions(build(*launch)) == each


DISPATCH = """
import sys, warnings, torch, hf_littlebit.kernels as k
assert not [m for m in sys.modules if m.startswith("hf_littlebit.kernels.g") and m.endswith(("gemv", "gemm"))]
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for kind in {kinds!r}:
        for _ in range(2):
            print(kind, k._accelerated(kind).__name__.split(".")[-1])
print([str(w.message) for w in seen])
"""
WITHOUT = "import sys; sys.modules['triton'] = None\n"


@pytest.mark.slow
@pytest.mark.subprocess
def test_an_accelerator_without_kernels_says_so_once():
    done = python("-c", WITHOUT + DISPATCH.format(kinds=["cuda", "mps", "meta"]), LITTLEBIT_BACKEND="")
    lines = done.stdout.splitlines()
    assert lines[:-1] == [f"{kind} reference" for kind in ("cuda", "mps", "meta") for _ in range(2)], done.stderr
    assert lines[-1].count("triton is not installed") == 1 and "pip install triton" in lines[-1]
    assert lines[-1].count("no kernels for mps devices") == 1 and lines[-1].count("'littlebit: ") == 2
    done = python("-c", WITHOUT + DISPATCH.format(kinds=["cuda"]), LITTLEBIT_BACKEND="reference")
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    done = python("-c", WITHOUT + DISPATCH.format(kinds=["cuda"]), LITTLEBIT_BACKEND="triton")
    assert "RuntimeError: LITTLEBIT_BACKEND=triton, but triton is not installed" in done.stderr


@pytest.mark.slow
@pytest.mark.subprocess
@needs_triton
def test_triton_is_chosen_for_gpus():
    for name in ("", "cpu", "triton"):
        done = python("-c", DISPATCH.format(kinds=["cuda", "xpu"]), LITTLEBIT_BACKEND=name, TRITON_INTERPRET="0")
        assert done.stdout.splitlines() == ["cuda gpu"] * 2 + ["xpu gpu"] * 2 + ["[]"], done.stdout + done.stderr


PRODUCT = """
import torch, hf_littlebit.kernels as k
byte, one = torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1)
parts = (torch.zeros(0, 1, dtype=torch.int32), byte, None, byte, one, one[0], one)
print({call}(one, [k.PackedLayer(*parts, None, [1])])[0].item())
"""


@pytest.mark.slow
@pytest.mark.subprocess
@interprets
def test_cpu_tensors_need_the_interpreter():
    done = python("-c", PRODUCT.format(call="k.products"), LITTLEBIT_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.stdout == "1.0\n", done.stderr
    done = python("-c", PRODUCT.format(call="k.products"), LITTLEBIT_BACKEND="triton", TRITON_INTERPRET="0")
    assert "RuntimeError: LITTLEBIT_BACKEND=triton, but triton compiles for GPUs only" in done.stderr
    done = python("-c", PRODUCT.format(call="k.gpu.products"), LITTLEBIT_BACKEND="", TRITON_INTERPRET="0")
    assert "RuntimeError: x is on the CPU" in done.stderr
