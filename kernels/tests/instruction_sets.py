"""A pytest plugin for the tests of the compiled CPU kernel: every instruction set of this machine, and the threads."""

import pytest
import torch

from hf_littlebit.kernels import cpu


def sets():
    """The instruction sets that this machine can run."""
    if not cpu.LIBRARY.exists() or not cpu.load():
        return ["none"]
    found = []
    for isa in ("amx", "avx512", "avx2", "neon", "generic"):
        try:
            found.append(cpu.select(isa))
        except RuntimeError:
            continue
    cpu.select("auto")
    return found


@pytest.fixture(params=sets())
def isa(request):
    if request.param == "none":
        pytest.skip("the compiled CPU kernel is not built")
    assert cpu.select(request.param) == request.param
    yield request.param
    cpu.select("auto")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
