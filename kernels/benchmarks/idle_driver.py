"""A driver for triton whose GPU does nothing: kernels compile for an H100, and a launch returns at once.

What is left of a call is what it costs the host before the driver: the checks, the allocations, triton's own front door
(binding and specializing the arguments, finding the compiled kernel). The driver's own microseconds, about two for each
launch, are missing. Tensors are CPU tensors, which no kernel reads.
"""

import os
from typing import Any

__all__ = ["IdleDriver", "install"]

THREADS = 1024  # of a program, at most
SHARED = 232448  # bytes of shared memory that a program of an H100 may take


class IdleUtils:
    """What the compiler asks of a device."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> Any:
        return None, 1, 32, 0, THREADS  # module, function, registers, spilled bytes, threads

    def unload_module(self, module: Any) -> None: ...

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": SHARED, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class IdleLauncher:
    """In place of the compiled function that hands arguments to the driver."""

    def __init__(self, src: Any, metadata: Any):
        self.src, self.metadata = src, metadata

    def __call__(self, *arguments: Any, **named: Any) -> None: ...


class IdleDriver:
    """triton.runtime.driver.active of a machine without a GPU."""

    launcher_cls = IdleLauncher

    def __init__(self) -> None:
        self.utils = IdleUtils()

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple:
        return 9, 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def install() -> None:
    """Make triton launch on the idle GPU, and the layers' kernels accept CPU tensors, in this process."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: nothing is compiled or launched; unset it")
    os.environ["LITTLEBIT_BACKEND"] = "triton"
    import triton
    from hf_littlebit.kernels import gpu, tuning

    triton.runtime.driver.set_active(IdleDriver())
    gpu.interpreted = lambda: True  # the one place that refuses CPU tensors
    tuning._cores = lambda device: 132
