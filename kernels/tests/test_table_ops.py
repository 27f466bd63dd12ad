"""The operators of packed tables: what is chosen, gradients, fake tensors, torch.compile."""

import os
import subprocess
import sys

import pytest
import torch
from hf_littlebit.kernels import cpu, table_cpu, table_reference
from tables import KINDS, made, worst_row
from torch._subclasses.fake_tensor import FakeTensorMode

import hf_littlebit  # noqa: F401
from hf_littlebit import kernels
from hf_littlebit.layers import table_ops


@pytest.mark.parametrize("bits, grouped", KINDS)
def test_a_head_and_its_gradients(bits, grouped):
    packed, matrix = made(70, 130, bits, grouped)
    for lead in ((), (3,), (2, 5)):
        x, bias = torch.randn(*lead, 130, requires_grad=True), torch.randn(70, requires_grad=True)
        y = table_ops.head(x, *packed[:2], bias)
        assert worst_row(y.detach(), x.detach(), matrix.T, bias.detach()) < 1e-6
        grad = torch.randn_like(y)
        y.backward(grad)
        assert worst_row(x.grad, grad, matrix) < 1e-6
        assert torch.allclose(bias.grad, grad.reshape(-1, 70).sum(0), atol=1e-5)
    with torch.no_grad():
        assert torch.equal(table_ops.head(x, *packed[:2], bias), y)
    with pytest.raises(RuntimeError, match="scales of a packed table ask for a gradient"):
        table_ops.head(x, packed.codes, packed.scale.clone().requires_grad_())


@pytest.mark.parametrize("bits, grouped", KINDS)
def test_the_operators_keep_torchs_rules(bits, grouped):
    packed, _ = made(7, 70, bits, grouped)
    x = torch.randn(3, 70, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    operators = torch.ops.hf_littlebit
    torch.library.opcheck(operators.head, (x, *packed[:2], torch.randn(7)), test_utils=tests)
    torch.library.opcheck(operators.head_grad, (torch.randn(3, 7), *packed), test_utils=tests)
    indices = torch.tensor([[1, 2, 6]])
    torch.library.opcheck(operators.embedding, (indices, *packed, torch.bfloat16), test_utils=tests)


def test_parts_elsewhere_are_refused():
    packed, _ = made(7, 70, 8, False)
    with pytest.raises(RuntimeError, match="the packed table is on meta"):
        table_ops.head(torch.randn(3, 70), packed.codes.to("meta"), packed.scale)
    with pytest.raises(RuntimeError, match="the packed table is on meta"):
        table_ops.embedding(torch.tensor([1]), packed.codes.to("meta"), packed.scale.to("meta"), 70, torch.float32)


def test_fake_tensors():
    with FakeTensorMode():
        codes, scale = torch.empty(70, 24, dtype=torch.int32), torch.empty(70, 3, dtype=torch.bfloat16)
        y = table_ops.head(torch.empty(2, 3, 130), codes, scale)
        assert y.shape == (2, 3, 70) and y.dtype == torch.float32
        rows = table_ops.embedding(torch.empty(2, 3, dtype=torch.int64), codes, scale, 130, torch.float16)
        assert rows.shape == (2, 3, 130) and rows.dtype == torch.float16


@pytest.mark.parametrize("bits, grouped", KINDS)
def test_compiled_as_one_graph(bits, grouped):
    packed, matrix = made(70, 130, bits, grouped)

    def tied(indices):
        hidden = table_ops.embedding(indices, *packed, torch.float32)
        return hidden, table_ops.head(2 * hidden, *packed[:2])

    compiled = torch.compile(tied, fullgraph=True, backend="aot_eager")
    for count in (1, 4, 9):
        indices = torch.randint(70, (1, count))
        (hidden, y), (eager, right) = compiled(indices), tied(indices)
        assert torch.equal(hidden, eager) and torch.equal(y, right)
        assert worst_row(y, 2 * hidden, matrix.T) < 1e-6


@pytest.mark.skipif(not cpu.LIBRARY.exists(), reason="the compiled CPU kernel is not built")
def test_the_compiled_kernel_is_chosen(monkeypatch):
    packed, _ = made(7, 70, 8, False)
    seen = []
    monkeypatch.setattr(table_cpu, "head", lambda *arguments: seen.append(arguments))
    kernels.head(torch.randn(3, 70), *packed[:2])
    assert seen and kernels._tables(torch.empty(1, device="meta")) is table_reference


CHOICE = """
import sys; sys.path.insert(0, {folder!r})
import torch, hf_littlebit.kernels as k
from hf_littlebit.layers import table_ops
from tables import made
packed, matrix = made(7, 70, 4, None)
x = torch.randn(3, 70)
y = table_ops.head(x, *packed[:2])
print(k._tables(x).__name__.split(".")[-1], bool((y.double() - x.double() @ matrix.T).abs().max() < 1e-4))
"""


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.parametrize("name, module", [("reference", "table_reference"), ("cpu", "table_cpu")])
def test_the_variable_names_the_implementation(name, module):
    if name == "cpu" and not cpu.LIBRARY.exists():
        pytest.skip("the compiled CPU kernel is not built")
    environment = {**os.environ, "LITTLEBIT_BACKEND": name, "OMP_NUM_THREADS": "1"}
    code = CHOICE.format(folder=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == [module, "True"], done.stderr
