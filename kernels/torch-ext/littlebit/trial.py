"""One case of tuner.py on the device: its weights, its launches with tiles of any size, their time and their error.

    kernel_keys(case, config)      what is compiled for it: {"one" or "two": a key that is equal where the kernels are}
    run_once(job)            compile and run one product's launches, in a process of its own (workers.py)
    Trial(case)              .error(config) against the reference, .microseconds(config, side) in CUDA graphs

The two products of a layer are kernels of their own, and tiles of one do not depend on the other's: they are compiled apart,
so that a kernel which serves many candidates, shapes and numbers of tokens is compiled once, and are timed apart where the
whole is their sum. Weights are rotated over copies that together leave no cache warm, as a model's layers do.
"""

import statistics
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from . import reference
from .candidates import Case
from .device import abilities
from .launch import Step, run
from .parts import PARTS, PackedLayer, factor_shapes
from .tuning import Decode, Few

__all__ = ["Job", "Trial", "current_device", "kernel_keys", "launches", "random_layer", "run_once"]

CALLS = 24  # of a product, in a graph that is timed
COLD = 200 << 20  # bytes of copies that are rotated, so that weights come from memory
COPIES = 64  # at most: the smallest layers stay in the cache, as they do in a model
SECOND = ("contract", "stage_two")  # kernels of the second product, by their names without underscores


class Job(NamedTuple):
    """Launches that a process runs once: those of one product ("one", "two"), or all ("both")."""

    case: Case
    config: Any
    side: str


def current_device() -> torch.device:
    """The CUDA device that is tuned."""
    return torch.device("cuda", torch.cuda.current_device())


def random_layer(out: int, into: int, ranks: Sequence[int], device: torch.device) -> PackedLayer:
    """A layer without bias whose parts are drawn at random; on the meta device they have no values."""
    found: Dict[str, Any] = dict.fromkeys(PARTS)
    for name, (shape, dtype) in factor_shapes(into, out, ranks).items():
        if device.type == "meta":
            found[name] = torch.empty(shape, dtype=dtype, device=device)
        elif dtype.is_floating_point:
            found[name] = torch.randn(shape, device=device).to(dtype)
        else:
            info = torch.iinfo(dtype)
            found[name] = torch.randint(info.min, info.max, shape, device=device, dtype=dtype)
    if found["v"] is None:  # of less than a word of inputs no word is read, but the kernels want a tensor
        found["v"] = found["u"]
    return PackedLayer(**found, bias=None, ranks=ranks)


class _Weights:
    """A case's layers, in copies, with x and the results."""

    def __init__(self, case: Case, device: torch.device, most: int):
        shapes = [(out, case.into, ranks) for out, ranks in zip(case.outs, case.ranks)]  # noqa: B905 Python 3.9
        size = sum(sum(ranks) * (out + into) // 8 for out, into, ranks in shapes)
        count = min(most, COPIES, 1 + COLD // size)
        self.copies = [[random_layer(*shape, device) for shape in shapes] for _ in range(count)]
        made, summed = ((case.into,), case.outs[0]) if case.transposed else (case.outs, case.into)
        # Small, so that the results stay inside fp16.
        self.x = (0.01 * torch.randn(case.tokens, summed, device=device)).to(case.dtype)
        self.results = [self.x.new_empty(case.tokens, out) for out in made]


def launches(
    case: Case, config: Any, weights: Any, index: int = 0, able: Tuple[bool, bool] = (False, False)
) -> Iterator[Step]:
    """The steps of the product with the copy of that index."""
    from . import decode, gemm, gemv

    layers = weights.copies[index % len(weights.copies)]
    if isinstance(config, Few):
        return decode.launches(weights.x, layers, weights.results, config, able)
    if isinstance(config, Decode):
        return gemv.launches(weights.x, layers, weights.results, config)
    form = gemm.form_of(config, case.dtype)
    return form(weights.x, layers[0], weights.results[0], config, case.transposed)


def _name(step: Step) -> str:
    kernel = step[0]
    return str(getattr(getattr(kernel, "fn", kernel), "__name__", "")).strip("_")


def _sides(steps: Sequence[Step]) -> Dict[str, Sequence[Step]]:
    """The launches of the two products apart; whatever comes before the second belongs to the first."""
    after = next((place for place, step in enumerate(steps) if _name(step) in SECOND), len(steps))
    return {"one": steps[:after], "two": steps[after:]} if after < len(steps) else {"both": steps}


def kernel_keys(case: Case, config: Any) -> Dict[str, Any]:
    """What is compiled for each product: equal keys are equal kernels, whatever the shapes, splits and grids.

    The key is what triton specializes a kernel on: its options, the dtypes of tensors, and which integers are 1 or a multiple
    of 16. Nothing is computed: the launches are listed for tensors without memory.
    """
    sides = _sides(list(launches(case, config, _Weights(case, torch.device("meta"), 1))))
    return {side: tuple(map(_kernel_key, found)) for side, found in sides.items()}


def _kernel_key(step: Step) -> Any:
    kernel, _, arguments, options = step
    parameters = getattr(kernel, "params", None) or [None] * len(arguments)
    special = [
        _specialized(value, not getattr(parameter, "do_not_specialize", False))
        for value, parameter in zip(arguments, parameters)  # noqa: B905 Python 3.9
    ]
    return _name(step), tuple(special), tuple(sorted((name, str(value)) for name, value in options.items()))


def _specialized(value: Any, aligned: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if isinstance(value, tuple):
        return tuple(_specialized(item, aligned) for item in value)
    if isinstance(value, int) and aligned:
        return value if value == 1 else "16" if value % 16 == 0 else "int"
    return type(value).__name__


_last: List[Tuple[Case, _Weights]] = []  # what this process ran last


def run_once(job: Job) -> None:
    """Compile and run the job's launches, once. The process ends where that leaves the device unusable.

    Raises:
        Exception: the kernel does not compile, or does not fit the device; every backend has its own error for that.
    """
    case, config, side = job
    device = current_device()
    try:
        if not _last or _last[0][0] != case:
            _last[:] = [(case, _Weights(case, device, 1))]
        _run_side(case, config, side, _last[0][1], 0, abilities(device))
        torch.cuda.synchronize()
    except Exception:
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise SystemExit(3) from error
        raise


def _run_side(case: Case, config: Any, side: str, weights: _Weights, index: int, able: Tuple[bool, bool]) -> None:
    steps = launches(case, config, weights, index, able)
    run(steps if side == "both" else _sides(list(steps))[side])


class Trial:
    """A case whose candidates are checked and timed in this process."""

    def __init__(self, case: Case):
        self.case = case
        device = current_device()
        self._able = abilities(device)
        self._weights = _Weights(case, device, COPIES)
        self._exact: List[torch.Tensor] = []

    def error(self, config: Any) -> float:
        """Of the results, the worst of all layers, relative to their norm; infinite where a number is none."""
        if not self._exact:
            self._exact = [self._reference(layer) for layer in self._weights.copies[0]]
        for y in self._weights.results:
            y.fill_(float("nan"))  # what is not written is wrong
        try:
            _run_side(self.case, config, "both", self._weights, 0, self._able)
        except Exception as error:  # what ran for another shape may not for this one
            _passed_over(config, error)
            return float("inf")
        wrong = [
            float((y.float() - exact).norm() / exact.norm())
            for y, exact in zip(self._weights.results, self._exact)  # noqa: B905 Python 3.9
        ]
        return max(value if value == value else float("inf") for value in wrong)

    def _reference(self, layer: PackedLayer) -> torch.Tensor:
        return reference.products(self._weights.x.float(), [layer], self.case.transposed)[0]

    def microseconds(self, configs: Sequence[Any], side: str = "both", rounds: int = 5) -> List[float]:
        """Of one call each, the median of rounds in which they take turns; infinite for one that no graph can hold."""
        graphs = [self._captured(config, side) for config in configs]
        times: List[List[float]] = [[] for _ in configs]
        for turn in range(rounds + 1):
            for graph, spent in zip(graphs, times):  # noqa: B905 Python 3.9
                if graph is not None:
                    took = _replayed(graph) / CALLS
                    if turn:
                        spent.append(took)
        return [statistics.median(spent) if spent else float("inf") for spent in times]

    def _captured(self, config: Any, side: str) -> Optional["torch.cuda.CUDAGraph"]:
        def call(index: int) -> None:
            _run_side(self.case, config, side, self._weights, index, self._able)

        try:
            return _graph(call)
        except Exception as error:  # one that fits alone may not fit a graph
            _passed_over(config, error)
            return None


def _passed_over(config: Any, error: Exception) -> None:
    """Go on without `config`; raises where the device cannot go on."""
    torch.cuda.synchronize()
    print(f"passed over {tuple(config)}: {type(error).__name__}: {str(error)[:100]}")


def _graph(call: Callable[[int], None]) -> "torch.cuda.CUDAGraph":
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            call(index)
    return graph


def _replayed(graph: "torch.cuda.CUDAGraph") -> float:
    """Microseconds of the whole graph."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1000 * begin.elapsed_time(end)
