"""The private doors of torch: who watches a call, what hangs on a module, and counters that no public function returns.

Every function is one door; its text says what needs it and what the public way would be. They were tested with torch 2.13,
by tests/test_internals.py. kernels/ has a door of its own (torch._C._cuda_getDevice), because it imports nothing of
hf_littlebit. Private methods of nn.Module that a subclass overrides (_apply, _save_to_state_dict) are no doors: torch calls
them on every module, and its documentation of nn.Module names them.

Some are called for every layer and token, where each microsecond of the host counts: these do no more than they must.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

# A torch.autograd.Function for one level of torch.func's transforms, to be used in an operator's own kernel, which the
# dispatcher asks once for each level. Public way: torch.autograd.Function, which goes through all levels at once, and which
# therefore has to be called above the dispatcher, where torch.compile and others who call the operator do not come by.
from torch.autograd.function import _SingleLevelFunction as OneLevelFunction

# A mode sees every operator with its tensors. Public way: torch documents the class, for profilers and loggers, but not under
# a public name.
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "OneLevelFunction",
    "TorchDispatchMode",
    "below_autograd",
    "compiled_model",
    "cuda_stream",
    "has_global_hooks",
    "has_own_call",
    "in_forward_mode",
    "in_function_transform",
    "is_convolution",
    "is_watched",
    "module_hooks",
    "module_state",
    "one_level",
    "operators_are_watched",
    "own_parameters",
    "recording",
    "version",
    "without_overrides",
]


# -- who watches --------------------------------------------------------------------------------------------------------------


def operators_are_watched() -> bool:
    """Whether a dispatch mode is active: fake tensors, a counter of operations, a tracer.

    A launch that goes around the dispatcher would be hidden from it. Public way: none.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def in_function_transform() -> bool:
    """Whether the call is inside of torch.func's vmap, grad, jvp or functionalize.

    Their tensors are wrappers, which have no memory to launch a kernel on. Public way: none.
    """
    return torch._C._functorch.maybe_current_level() is not None


def in_forward_mode() -> bool:
    """Whether the call is inside of a `torch.autograd.forward_ad.dual_level`, with or without torch.no_grad. Public way: none."""
    return forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether anything but the kernels wants to see an operator: the two above, forward-mode derivatives, torch.jit.trace.

    Written out rather than calling them, because it is asked for every layer and token. Public way: none, for none of the four.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def below_autograd() -> AbstractContextManager[None]:
    """A block in which the dispatcher passes autograd by, for a call that records no gradient.

    Public way: none. Under torch.no_grad the dispatcher still takes the step through autograd's Python, which costs a small
    layer as much as all the rest of its call.
    """
    return torch._C._AutoDispatchBelowAutograd()


def one_level() -> AbstractContextManager[None]:
    """A block in which a OneLevelFunction may be applied inside of torch.func's transforms. Public way: none, as for the class."""
    return enable_single_level_autograd_function()  # type: ignore[no-untyped-call, no-any-return]


@contextmanager
def recording(in_transform: bool) -> Iterator[None]:
    """A block in the forward of a OneLevelFunction, in which an operator is called for the levels below.

    The forward runs with gradients off, which holds for its own level only: the levels below, if it runs in a transform of
    torch.func, may record. Public way: none, as for the class.
    """
    with torch.set_grad_enabled(in_transform), forward_ad._set_fwd_grad_enabled(in_transform), below_autograd():
        yield


def without_overrides() -> AbstractContextManager[None]:
    """A block in which functions take subclasses of tensors for plain ones, for use in a `__torch_function__`.

    Public way: none; torch's notes on extending it name this class.
    """
    return torch._C.DisableTorchFunctionSubclass()


# -- tensors and streams ------------------------------------------------------------------------------------------------------


def version(x: Tensor) -> int:
    """How often x was changed in place; for a tensor that was made under inference_mode, which does not count, 0.

    A result that is kept for x is only good while x is what it was. Public way: none that costs less than a comparison.
    """
    return 0 if x.is_inference() else x._version


def cuda_stream(device_index: int) -> int:
    """The current stream of a GPU, as the number that CUDA knows it by.

    Public way: `torch.cuda.current_stream(index).cuda_stream`, which makes an object for every layer and token.
    """
    return torch._C._cuda_getCurrentRawStream(device_index)


# -- modules ------------------------------------------------------------------------------------------------------------------


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary in which `module` holds its own parameters: the same object at every call.

    Public way: `named_parameters(recurse=False)` walks through generators for every layer and token, and leaves out
    parameters that are None.
    """
    return module._parameters


class ModuleState(NamedTuple):
    """What a module holds, as it holds it: nothing is copied, and nothing is to be changed."""

    own: dict[str, Any]  # all attributes, tensors among them
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]
    children: dict[str, nn.Module | None]
    hooked: bool  # whether functions run before or after its forward: `module_hooks`


def module_state(module: nn.Module) -> ModuleState:
    """All that `module` itself holds. A recorded step depends on the addresses of all of these tensors.

    Public way: none; named_buffers and named_parameters leave out tensors that are plain attributes, and walking through them
    takes several times as long, at every text that is generated.
    """
    own = vars(module)
    hooked = bool(own["_forward_hooks"] or own["_forward_pre_hooks"])
    return ModuleState(own, own["_parameters"], own["_buffers"], own["_modules"], hooked)


def module_hooks(module: nn.Module) -> list[Any]:
    """The functions that run before and after the forward of `module`.

    Public way: none; torch gives a handle to whoever registers a hook, and to nobody else.
    """
    state = vars(module)
    return [*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values()]


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of any number of dimensions. Public way: to list the six public classes of them."""
    return isinstance(module, nn.modules.conv._ConvNd)


def has_global_hooks() -> bool:
    """Whether hooks are registered that run for every module. Public way: none, as for the hooks of one module."""
    return torch.nn.modules.module._has_any_global_hook()


def has_own_call(model: nn.Module) -> bool:
    """Whether `model.compile()` was called, which compiles the model in place. Public way: none."""
    return getattr(model, "_compiled_call_impl", None) is not None


def compiled_model(model: Any) -> Any:
    """The model that `torch.compile(model)` wrapped, or None where `model` is no such wrapper.

    Public way: none; the wrapper passes every attribute on, but is not an instance of the model's class.
    """
    return getattr(model, "_orig_mod", None)
