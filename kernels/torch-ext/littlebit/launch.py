"""Launching Triton kernels: by the JIT the first time, and then without its front door.

A product is a list of steps (kernel, grid, arguments, options). `kernel[grid](*arguments, **options)` binds and classifies
every argument anew, which takes longer than the kernel runs. What it finds depends on the arguments' types, on which
integers are 1 or a multiple of 16, and on the alignment of pointers; for the same layer and as many tokens all of that stays
the same. So the first call goes through the JIT, and `record` keeps the compiled kernels with their arguments, tensors as
addresses. Later calls put the new addresses of x, of the results and of the scratch memory in place and call triton's
launcher itself, as torch's inductor does.

Addresses that change are of three kinds, and a recorded launch names them by their place in one list:

    inputs and results      the tensors that `record` is given as `moving`
    scratch                 what the steps allocated for themselves: one allocation serves all of it
    everything else         the layer's parts: their addresses are kept, and the caller answers for their staying valid
"""

import functools
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ["Recorded", "Step", "current_stream", "record", "run"]

Step = Tuple[Any, Tuple[int, ...], Tuple[Any, ...], Dict[str, Any]]  # kernel, grid, arguments, options
ALIGNMENT = 256  # bytes, of every piece of scratch


class _Launch(NamedTuple):
    """One compiled kernel with all that its launcher takes, in one list."""

    run: Callable[..., None]
    fixed: List[Any]
    stream: int  # the place of the stream
    places: List[Tuple[int, int]]  # (place, address that it takes)
    built: List[Tuple[int, Callable[[List[int]], Any]]]  # (place, what makes the tuple that it is)


class _Place(NamedTuple):
    """Stands for an address in a template: its place in the list of those that change."""

    address: int


class Recorded:
    """The launches of a product, ready for other addresses of x, results and scratch.

    Attributes:
        scratch_bytes: of the one allocation that they share; 0 if they need none.
    """

    def __init__(self, launches: List[_Launch], offsets: List[int], scratch_bytes: int):
        self._launches, self._offsets, self.scratch_bytes = launches, offsets, scratch_bytes

    def __call__(self, stream: int, addresses: List[int], scratch: int) -> None:
        """Launch on `stream`.

        Args:
            addresses: of the tensors that `record` got as `moving`, in their order. The list is extended in place.
            scratch: the address of `scratch_bytes` bytes, aligned to ALIGNMENT.
        """
        for offset in self._offsets:
            addresses.append(scratch + offset)
        for run, fixed, place, places, built in self._launches:
            arguments = fixed.copy()
            arguments[place] = stream
            for place, index in places:
                arguments[place] = addresses[index]
            for place, build in built:
                arguments[place] = build(addresses)
            run(*arguments)

    def repeat(self, x: torch.Tensor, address: int, results: Sequence[torch.Tensor]) -> None:
        """Launch on the current stream of x's device, with scratch from there.

        Args:
            address: of x's memory, or of that of its rows. results: the tensors that are written, in the recorded order.
        """
        addresses = [address]
        for y in results:
            addresses.append(y.data_ptr())
        scratch = 0
        if self.scratch_bytes:
            memory = x.new_empty(self.scratch_bytes, dtype=torch.uint8)
            scratch = memory.data_ptr()
        self(current_stream(x.get_device()), addresses, scratch)


@functools.lru_cache(maxsize=None)
def _stream_of() -> Callable[[int], int]:
    import triton

    return triton.runtime.driver.active.get_current_stream


def current_stream(index: int) -> int:
    """The current stream of the device of that index, as triton's launcher takes it."""
    return _stream_of()(index)


def run(steps: Iterable[Step]) -> None:
    """Launch the steps by the JIT, in their order."""
    for kernel, grid, arguments, options in steps:
        kernel[grid](*arguments, **options)


def record(steps: Iterable[Step], moving: Sequence[torch.Tensor], kept: Sequence[Any]) -> Optional[Recorded]:
    """`run(steps)`, and what it takes to launch the same again; None where nothing is compiled (the interpreter).

    Args:
        moving: tensors whose addresses will be others in later launches.
        kept: tensors (or None) whose addresses stay. Any other tensor among the arguments is scratch of the steps: it means
            nothing before them and nothing after.
    """
    known: Dict[int, Optional[int]] = {id(tensor): None for tensor in kept if tensor is not None}
    known.update({id(tensor): index for index, tensor in enumerate(moving)})
    offsets: List[int] = []
    size = 0
    alive = []  # so that no two pieces of scratch have one id
    launches: List[_Launch] = []
    whole = True
    for kernel, grid, arguments, options in steps:
        compiled = kernel[grid](*arguments, **options)
        for tensor in _tensors(arguments):
            if id(tensor) not in known:
                known[id(tensor)] = len(moving) + len(offsets)
                offsets.append(size)
                alive.append(tensor)
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if compiled is None or not hasattr(compiled, "packed_metadata"):
            whole = False
        if not whole:
            continue
        names = [parameter.name for parameter in kernel.params[len(arguments) :]]
        launcher, before, after = _launcher(compiled, (*grid, 1, 1)[:3])
        values = [_template(value, known) for value in (*arguments, *(options[name] for name in names))]
        fixed = [*before, None, *after, *values]
        launches.append(
            _Launch(
                launcher,
                fixed,
                len(before),
                [(place, value.address) for place, value in enumerate(fixed) if isinstance(value, _Place)],
                [(place, _builder(value)) for place, value in enumerate(fixed) if _has_places(value)],
            )
        )
    return Recorded(launches, offsets, size) if whole else None


def _launcher(compiled: Any, grid: Tuple[int, ...]) -> Tuple[Callable[..., None], Tuple[int, ...], Tuple[Any, ...]]:
    """(function, what it takes before the stream, what it takes after it and before the arguments) of a compiled kernel.

    `CompiledKernel.run` is triton's launcher, the one that torch's inductor calls. On a CUDA device it is an object whose
    method allocates scratch memory for those kernels that want any and then calls a C function; for the others the C
    function can be called by itself. Up to triton 3.6 its first arguments are those below; later ones are left to `run`.
    """
    launcher = compiled.run
    packed = compiled.packed_metadata
    early = getattr(launcher, "launch_pdl", None)
    sizes = (getattr(launcher, "global_scratch_size", 1), getattr(launcher, "profile_scratch_size", 1))
    if _bare_launch() and early is not None and sizes == (0, 0) and hasattr(launcher, "launch"):
        cooperative = launcher.launch_cooperative_grid
        return launcher.launch, grid, (compiled.function, cooperative, early, None, None, packed, None, None, None)
    return launcher, grid, (compiled.function, packed, None, None, None)


@functools.lru_cache(maxsize=None)
def _bare_launch() -> bool:
    """This triton's C launcher takes what `_launcher` gives it: read in the sources of 3.5 and 3.6."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 5), (3, 6))


def _tensors(values: Any) -> List[torch.Tensor]:
    """All tensors in nested tuples."""
    if isinstance(values, torch.Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, tuple) else []


def _template(value: Any, known: Dict[int, Optional[int]]) -> Any:
    """An argument with addresses in place of tensors, and `_Place`s in place of addresses that change."""
    if isinstance(value, torch.Tensor):
        index = known[id(value)]
        return value.data_ptr() if index is None else _Place(index)
    return tuple(_template(item, known) for item in value) if isinstance(value, tuple) else value


def _has_places(value: Any) -> bool:
    """A tuple with a `_Place` in it, at any depth."""
    if isinstance(value, _Place) or not isinstance(value, tuple):
        return False
    return any(isinstance(item, _Place) or _has_places(item) for item in value)


def _builder(template: Tuple[Any, ...]) -> Callable[[List[int]], Tuple[Any, ...]]:
    """A function from addresses to the tuple with them in place."""
    fixed = list(template)
    places = [(position, item.address) for position, item in enumerate(template) if isinstance(item, _Place)]
    nested = [(position, _builder(item)) for position, item in enumerate(template) if _has_places(item)]

    def build(addresses: List[int]) -> Tuple[Any, ...]:
        values = fixed.copy()
        for position, index in places:
            values[position] = addresses[index]
        for position, inner in nested:
            values[position] = inner(addresses)
        return tuple(values)

    return build
