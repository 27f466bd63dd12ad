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

A view of scratch or of a part is known by the memory that it lies in. Steps of dense.py are products of torch between launches.
"""

import functools
import weakref
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .dense import Dense, Multiplied, View

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

    def __init__(self, steps: Sequence[Any], offsets: List[int], scratch_bytes: int):
        self._offsets, self.scratch_bytes = offsets, scratch_bytes
        # Launches up to a product of torch's, or to the end; most have none.
        self._spans: List[Tuple[List[_Launch], Optional[Multiplied]]] = [([], None)]
        for step in steps:
            launches, _ = self._spans[-1]
            if isinstance(step, Multiplied):
                self._spans[-1:] = [(launches, step), ([], None)]
            else:
                launches.append(step)

    def __call__(
        self,
        stream: int,
        addresses: List[int],
        scratch: int,
        results: Sequence[torch.Tensor] = (),
        memory: Optional[torch.Tensor] = None,
    ) -> None:
        """Launch on `stream`, which is the current one.

        Args:
            addresses: of the tensors that `record` got as `moving`, in their order. The list is extended in place.
            scratch: the address of `scratch_bytes` bytes, aligned to ALIGNMENT.
            results, memory: for products of torch, the tensors that lie at these addresses.
        """
        for offset in self._offsets:
            addresses.append(scratch + offset)
        for launches, product in self._spans:
            self._launch(launches, stream, addresses)
            if product is not None:
                product(results, memory)

    @staticmethod
    def _launch(launches: List[_Launch], stream: int, addresses: List[int]) -> None:
        for run, fixed, place, places, built in launches:
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
        scratch, memory = 0, None
        if self.scratch_bytes:
            memory = x.new_empty(self.scratch_bytes, dtype=torch.uint8)
            scratch = memory.data_ptr()
        self(current_stream(x.get_device()), addresses, scratch, results, memory)


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
        moving: tensors whose addresses will be others in later launches: x, and the results as matrices.
        kept: tensors (or None) whose addresses stay. Any other tensor among the arguments is scratch of the steps: it means
            nothing before them and nothing after.
    """
    memory = _Memory(moving, kept)
    launches: List[Any] = []
    whole = True
    for kernel, grid, arguments, options in steps:
        compiled = kernel[grid](*arguments, **options)
        if isinstance(kernel, Dense):
            launches.append(memory.product(*arguments))
            continue
        known = memory.met(arguments)
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
    return Recorded(launches, memory.offsets, memory.size) if whole else None


class _Memory:
    """What the tensors of the steps are: moving, kept, or scratch, which is laid out as it is met.

    Attributes:
        offsets: bytes from the beginning of the scratch, of every tensor in it. size: bytes of all scratch.
    """

    def __init__(self, moving: Sequence[torch.Tensor], kept: Sequence[Any]):
        parts = [part for part in kept if part is not None]
        self._known: Dict[int, Optional[int]] = {id(tensor): None for tensor in parts}
        self._known.update({id(tensor): index for index, tensor in enumerate(moving)})
        self._kept = {_memory_of(part) for part in parts}
        self._results = {_memory_of(y): (index, y) for index, y in enumerate(moving[1:])}
        self._moving = len(moving)
        self._pieces: Dict[int, int] = {}  # of scratch: where its memory is, and will be
        self._alive: List[torch.Tensor] = []  # so that no two tensors have one id, or one memory
        self.offsets: List[int] = []
        self.size = 0

    def met(self, arguments: Tuple[Any, ...]) -> Dict[int, Optional[int]]:
        """By id, the place of every tensor's address among those that change; None for one that stays."""
        for tensor in _tensors(arguments):
            if id(tensor) not in self._known:
                self._alive.append(tensor)
                self._known[id(tensor)] = None
                if _memory_of(tensor) not in self._kept:
                    self._known[id(tensor)] = self._moving + len(self.offsets)
                    self.offsets.append(self._scratch(tensor))
        return self._known

    def _scratch(self, tensor: torch.Tensor) -> int:
        """Bytes from the beginning of the scratch to a tensor in it."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._pieces:
            self._alive.append(tensor)
            self._pieces[address] = self.size
            self.size += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        return self._pieces[address] + tensor.data_ptr() - address

    def product(
        self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, bias: Optional[torch.Tensor], first: int
    ) -> Multiplied:
        """What a step of dense.py takes to be repeated."""
        return Multiplied(
            out.dtype,
            self._view(left),
            self._view(right),
            self._view(out),
            None if bias is None else weakref.ref(bias),
            first,
        )

    def _view(self, tensor: torch.Tensor) -> View:
        source, base = self._results.get(_memory_of(tensor), (-1, tensor))
        offset = self._scratch(tensor) if source < 0 else tensor.data_ptr() - base.data_ptr()
        return View(source, tuple(tensor.shape), tensor.stride(), offset // tensor.element_size())


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


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
