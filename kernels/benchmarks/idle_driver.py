"""A driver for triton whose GPU does nothing: kernels compile for an H100, and a launch returns at once.

What is left of a call is what it costs the host before the driver: the checks, the allocations, triton's own front door
(binding and specializing the arguments, finding the compiled kernel). The driver's own microseconds, about two for each
launch, are missing. Tensors are CPU tensors, which no kernel reads.
"""

import os
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

__all__ = ["IdleDriver", "Launch", "install"]

THREADS = 1024  # of a program, at most
STREAM = 7  # every device's current one
SHARED = 232448  # bytes of shared memory that a program of an H100 may take


class IdleUtils:
    """What the compiler asks of a device. A kernel's handle is its place in `names`."""

    def __init__(self) -> None:
        self.names: List[str] = []

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> Any:
        self.names.append(name)
        return None, len(self.names) - 1, 32, 0, THREADS  # module, function, registers, spilled bytes, threads

    def unload_module(self, module: Any) -> None: ...

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": SHARED, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Launch(NamedTuple):
    """A launch that was written down; tensors among the arguments are those that the launcher was given, or addresses."""

    kernel: str
    grid: Tuple[int, ...]
    stream: int
    arguments: Tuple[Any, ...]


class IdleDriver:
    """triton.runtime.driver.active of a machine without a GPU.

    Attributes:
        launches: every launch since this list was set; None to write nothing down, which costs nothing.
    """

    def __init__(self) -> None:
        self.utils = IdleUtils()
        self.launches: Optional[List[Launch]] = None

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What stands in place of the compiled function that hands arguments to the driver."""

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if self.launches is not None:
                # Before the kernel's own: packed metadata, the launch's metadata, two hooks.
                self.launches.append(Launch(self.utils.names[function], (x, y, z), stream, rest[4:]))

        return launch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int = 0) -> int:
        return STREAM

    def get_device_capability(self, device: int = 0) -> tuple:
        return 9, 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def install() -> IdleDriver:
    """Make triton launch on the idle GPU, and the layers' kernels accept CPU tensors, in this process.

    Only in a process of its own: kernels remember what they were compiled for.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: nothing is compiled or launched; unset it")
    os.environ["LITTLEBIT_BACKEND"] = "triton"
    import triton
    from hf_littlebit.kernels import gpu, tuning

    driver = IdleDriver()
    triton.runtime.driver.set_active(driver)
    gpu.interpreted = lambda: True  # the one place that refuses CPU tensors
    tuning.cores = lambda device: 132
    return driver
