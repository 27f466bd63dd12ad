"""Launches that are recorded and repeated, against a driver that does nothing but write down what it is given.

Run by test_recorded.py in a process of its own, because kernels remember what they were compiled for.
"""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from calls import linear, linear_grad, linears
from hf_littlebit.kernels import dense, gpu, launch, tuning
from idle_driver import STREAM, install
from test_cpu import layer

DRIVER = install()
TALL = (129, 257, (40, 8))  # tails of both factors
UNPACKED = tuning.Tiles(64, 16, 4, 2, 1, 64, 16, 4, 2, 1, 1, 1, 1)
# Layers, tokens, dtype, gradient, tiles.
CASES = {
    "one token": ([TALL], 1, torch.bfloat16, False, None),
    "three tokens": ([TALL], 3, torch.float32, False, None),
    "a group": ([TALL, (96, 257, (64,)), (33, 257, (16, 16))], 1, torch.bfloat16, False, None),
    "a group of many tokens": ([TALL, (96, 257, (64,))], 20, torch.bfloat16, False, None),
    "many tokens": ([TALL], 70, torch.bfloat16, False, None),
    "splits": ([TALL], 40, torch.float32, False, tuning.Tiles(32, 16, 4, 2, 3, 64, 16, 4, 2, 2, 1, 3)),
    "gradient": ([TALL], 40, torch.bfloat16, True, None),
    "unpacked": ([TALL], 40, torch.bfloat16, False, UNPACKED),
    "gradient, unpacked": ([TALL], 40, torch.bfloat16, True, UNPACKED),
    "without matrix units": ([TALL], 40, torch.float32, False, tuning.Tiles(32, 16, 4, 2, 3, 32, 16, 4, 2, 1, 1, 0)),
}


@pytest.fixture(autouse=True)
def anew():
    gpu.forget()
    tuning.forget()
    yield
    DRIVER.launches = None


@pytest.fixture(autouse=True)
def multiplied(monkeypatch):
    """Dense products are written down among the launches, in which they stand as they are done."""

    def write(self, left, right, out, bias, first):
        if DRIVER.launches is not None:
            tensors = (left, right, out) if bias is None else (left, right, out, bias)
            sizes = tuple((*one.shape, *one.stride(), one.dtype) for one in tensors[:3])
            DRIVER.launches.append(SimpleNamespace(kernel=self, grid=(), stream=STREAM, arguments=(*tensors, *sizes)))

    monkeypatch.setattr(dense.Dense, "__call__", write)


@pytest.fixture(params=CASES, ids=str)
def case(request, monkeypatch):
    """The layers of a case with their call, which returns (results, launches)."""
    shapes, tokens, dtype, gradient, tiles = CASES[request.param]
    if tiles is not None:
        monkeypatch.setattr(tuning, "tiles", lambda *_: tiles)
    layers = []
    for out, into, ranks in shapes:
        layers.append([*layer(out, into, ranks)[0], None if gradient else torch.randn(out), ranks])

    def call(x):
        DRIVER.launches = []
        if gradient:
            *parts, _, ranks = layers[0]
            found = [linear_grad(gpu, x, *parts, ranks)]
        elif len(layers) == 1:
            found = [linear(gpu, x, *layers[0])]
        else:
            found = linears(gpu, x, layers)
        return found, DRIVER.launches

    size = shapes[0][0 if gradient else 1]

    def x(more=()):
        return torch.randn(*more, tokens, size).to(dtype)

    call(x())  # layers that are met for the first time may never come again: nothing is recorded
    return SimpleNamespace(layers=layers, call=call, x=x, tokens=tokens)


def pointers(value, like=None):
    """A launch's arguments in one list, tensors as ("at", address); where `like` has one, a number is an address too."""
    if isinstance(value, tuple):
        pairs = like if isinstance(like, tuple) else [None] * len(value)
        return [item for one, other in zip(value, pairs, strict=True) for item in pointers(one, other)]
    if isinstance(value, torch.Tensor):
        return [("at", value.data_ptr())]
    return [("at", value)] if isinstance(like, torch.Tensor) else [value]


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


def memories(launches):
    """{address: (where the memory begins that it lies in, bytes of that)} of all tensors of the launches."""

    def walk(value):
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[value.data_ptr()] = storage.data_ptr(), storage.nbytes()
        for item in value if isinstance(value, tuple) else ():
            walk(item)

    found = {}
    for one in launches:
        walk(one.arguments)
    return found


def named(launches, first, x, results, layers):
    """The launches with names in place of addresses, scratch by its order, and the addresses of scratch."""
    names = {
        part.data_ptr(): f"part {i} {j}"
        for i, one in enumerate(layers)
        for j, part in enumerate(one[:8])
        if part is not None
    }
    names[x.data_ptr()] = "x"
    names.update({y.data_ptr(): f"y {i}" for i, y in enumerate(results)})
    scratch, found = [], []
    for one, model in zip(launches, first, strict=True):
        arguments = []
        for value in pointers(one.arguments, model.arguments):
            if isinstance(value, tuple):
                address = value[1]
                if address not in names:
                    names[address] = f"scratch {len(scratch)}"
                    scratch.append(address)
                value = names[address]
            arguments.append(value)
        found.append((one.kernel, one.grid, one.stream, arguments))
    return found, scratch


def test_the_second_call_launches_what_the_first_did(case):
    x = case.x()
    results, first = case.call(x)
    expected, scratch = named(first, first, x, results, case.layers)
    assert len(first) >= 2 and {one.stream for one in first} == {STREAM}
    held = [x, *results]  # so that the next call has other addresses
    for more in ((), (1,), (1, 1)):
        x = case.x(more)
        results, again = case.call(x)
        assert given_tensors(first) and not given_tensors(again)
        assert not {one.data_ptr() for one in (x, *results)} & {one.data_ptr() for one in held}
        found, places = named(again, first, x, results, case.layers)
        assert found == expected
        assert [y.shape[:-1] for y in results] == [x.shape[:-1]] * len(results)
        # One allocation serves all scratch: pieces in their order, aligned to each other and apart, and views inside them.
        # What lies inside a part or a result is found there.
        known, end = memories(first), None
        begins = {memory_of(part): memory_of(part) for one in case.layers for part in one[:8] if part is not None}
        begins.update({memory_of(old): memory_of(new) for old, new in zip(held[1:], results, strict=False)})
        for address, place in zip(scratch, places, strict=True):
            memory, size = known[address]
            if memory not in begins:
                begins[memory] = place - (address - memory)
                assert end is None or begins[memory] == end
                end = begins[memory] + -(-size // launch.ALIGNMENT) * launch.ALIGNMENT
            assert place - begins[memory] == address - memory
        held += [x, *results]


def given_tensors(launches):
    """Whether the JIT made the launches: it hands tensors to the driver, where what is repeated hands addresses."""
    kernels = [one for one in launches if not isinstance(one.kernel, dense.Dense)]
    return any(isinstance(value, torch.Tensor) for one in kernels for value in one.arguments)


def test_other_tokens_alignment_and_strides_are_recorded_by_themselves(case):
    x = case.x()
    case.call(x)
    misaligned = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    strided = torch.cat([x, x], -1)[:, : x.shape[-1]]
    # One row has no stride that anything depends on.
    for other, anew in ((case.x((2,)).flatten(0, 1), True), (misaligned, True), (strided, case.tokens > 1)):
        results, launches = case.call(other)
        assert given_tensors(launches) == anew and results[0].shape[0] == other.shape[0]
        assert not given_tensors(case.call(other)[1])
    assert not given_tensors(case.call(x)[1])


def test_a_changed_part_is_checked_again(case):
    x = case.x()
    results, first = case.call(x)
    case.call(x)
    for index in (0, 2, 4, 5, 6):
        part = case.layers[-1][index]
        case.layers[-1][index] = part[..., :-1].contiguous()
        with pytest.raises(RuntimeError, match="must be"):
            case.call(x)
        # Another tensor, and the same tensor with other memory: the new addresses are launched.
        case.layers[-1][index] = part.clone()
        for moved in (False, True):
            if moved:
                case.layers[-1][index].data = part.clone()
            for _ in range(2):
                results, launches = case.call(x)
                found, _ = named(launches, first, x, results, case.layers)
                assert any(f"part {len(case.layers) - 1} {index}" in arguments for *_, arguments in found)
    with pytest.raises(RuntimeError, match="must be"):
        case.layers[-1][8] = (8,)
        case.call(x)


def test_what_a_layer_keeps_is_launched_without_checks(case, monkeypatch):
    """`Bound.again`, on CPU tensors: the current device is the one that they are on."""
    from hf_littlebit.kernels import bound

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    x = case.x()
    results, first = case.call(x)
    kept = bound.find(case.layers)
    if kept is None:  # of a gradient nothing is kept by a layer
        pytest.skip("a gradient")
    assert kept.again(case.x()) is None  # it learns the shape
    held = [x, *results]
    x = case.x()
    expected, _ = named(first, first, *held[:1], held[1:], case.layers)
    DRIVER.launches = []
    results = kept.again(x)
    assert named(DRIVER.launches, first, x, results, case.layers)[0] == expected
    assert [y.shape for y in results] == [y.shape for y in held[1:]]
    misaligned = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    for other in (case.x((2,)), x.double(), x[:, :-1], misaligned):
        assert kept.again(other) is None and kept.again(other) is None
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    assert kept.again(x) is None
    bound.forget()
    assert kept.again(x) is None


@pytest.mark.parametrize("tokens", [1, 32])
def test_a_repeated_call_costs_half_of_the_front_door_at_most(tokens, monkeypatch):
    """Checks, allocations and launches of a repeated call, against the JIT's launches alone; medians in turns."""
    parts, *_ = layer(512, 1024, (96, 96))
    x = torch.randn(tokens, 1024).bfloat16()
    steps = []
    real = gpu.record

    def record(found, moving, kept):
        steps.extend(found)
        return real(steps, moving, kept)

    monkeypatch.setattr(gpu, "record", record)
    repeated = lambda: linear(gpu, x, *parts, None, (96, 96))  # noqa: E731
    repeated()  # meets the layer
    repeated()
    assert len(steps) >= 2
    times = {repeated: [], lambda: launch.run(steps): []}
    with torch.inference_mode():
        for turn in range(21):
            for call, spent in times.items():
                start = time.perf_counter()
                for _ in range(50):
                    call()
                if turn:
                    spent.append(time.perf_counter() - start)
    ours, front = map(statistics.median, times.values())
    print(f"{tokens} tokens: {1e6 * ours / 50:.1f} us, the front door {1e6 * front / 50:.1f} us")
    assert ours <= 0.5 * front


def test_the_bare_launcher_of_older_versions(monkeypatch):
    """Up to triton 3.6 the C launcher is called by itself where it needs no memory of its own."""
    calls = []
    launcher = SimpleNamespace(
        launch=lambda *arguments: calls.append(arguments),
        launch_pdl=True,
        launch_cooperative_grid=False,
        global_scratch_size=0,
        profile_scratch_size=0,
    )
    compiled = SimpleNamespace(run=launcher, packed_metadata="packed", function=5)
    monkeypatch.setattr(launch, "_bare_launch", lambda: True)
    run, before, after = launch._launcher(compiled, (4, 2, 1))
    fixed = [*before, None, *after, 0, 9]
    recorded = launch.Recorded([launch._Launch(run, fixed, len(before), [(len(fixed) - 2, 1)], [])], [0], 256)
    recorded(STREAM, [100], 1000)
    # Grid, stream, function, cooperative, early, two scratches; packed, metadata, two hooks; the kernel's arguments.
    assert calls == [(4, 2, 1, STREAM, 5, False, True, None, None, "packed", None, None, None, 1000, 9)]
    launcher.global_scratch_size = 64
    assert launch._launcher(compiled, (1, 1, 1))[0] is launcher
