"""Wrong parts and inputs are refused alike by plain torch and by the compiled library; Triton's turn is in triton_cases.py."""

import pytest
import torch
from calls import linear, linear_grad
from hf_littlebit.kernels import bound, cpu, reference
from test_cpu import built
from wrong_layers import CASES, OUT, fields, good

BACKENDS = [reference, pytest.param(cpu, marks=built)]


def refusal(backend, arguments, transposed):
    """The message with which `backend` refuses the arguments; None where it computes."""
    try:
        if transposed:
            *layer, _, ranks = fields(arguments)
            linear_grad(backend, *layer, ranks)
        else:
            linear(backend, *fields(arguments))
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__.rpartition(".")[2])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_refused_by_name(backend, transposed, case):
    name, change, message = CASES[case]
    if transposed and name == "bias":
        pytest.skip("a gradient has no bias")
    arguments = good()
    if transposed:
        arguments["x"] = torch.randn(2, OUT)
    assert refusal(backend, arguments, transposed) is None
    arguments[name] = change(arguments[name])
    found = refusal(backend, arguments, transposed)
    assert found is not None, "computed"
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(found)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__.rpartition(".")[2])
def test_a_part_elsewhere_is_refused(backend):
    for name, part in good().items():
        if isinstance(part, torch.Tensor):
            arguments = {**good(), name: part.to("meta")}
            with pytest.raises((RuntimeError, NotImplementedError), match=r"one device|Meta"):
                linear(backend, *fields(arguments))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.__name__.rpartition(".")[2])
def test_values_that_are_negated_lazily(backend):
    """Their memory holds the other signs: in x, in the scales and in the bias."""
    arguments = good()
    right = linear(backend, *fields(arguments))
    for name in ("x", "scale_out", "scale_rank", "scale_in", "bias"):
        lazy = torch._neg_view(-arguments[name])
        assert lazy.is_neg()
        assert torch.equal(linear(backend, *fields({**arguments, name: lazy})), right)


def test_plain_torch_checks_a_layer_once(monkeypatch):
    """What was met is looked up; a part that is replaced or resized is checked anew, and one that dies is forgotten."""
    count = []
    original = bound.checked
    monkeypatch.setattr(bound, "checked", lambda *given: count.append(1) or original(*given))
    arguments, known = good(), bound.known()
    for _ in range(3):
        linear(reference, *fields(arguments))
    assert len(count) == 1 and bound.known() == known + 1
    arguments["scale_rank"].data = arguments["scale_rank"][:1].clone()
    with pytest.raises(RuntimeError, match=r"scale_rank is \[1\]"):
        linear(reference, *fields(arguments))
    del arguments
    assert bound.known() == known
