"""A stand-in for triton's driver: kernels are compiled for a GPU that is not there, and launches are written down."""

from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget

NVIDIA, AMD = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)


class Driver:
    """What triton's JIT asks a driver for.

    Attributes:
        launches: (kernel's name, grid, stream, arguments) of every launch, or None to write nothing down.
    """

    def __init__(self, target=NVIDIA, launches=None):
        self.target, self.launches = target, launches
        names = []  # a handle is an index into them

        def load_binary(name, binary, shared, device):
            names.append(name)
            return len(names), len(names) - 1, 32, 0, 1024

        def launcher(source, metadata):
            def launch(x, y, z, stream, function, packed, about, entered, left, *arguments):
                if self.launches is not None:
                    self.launches.append((names[function], (x, y, z), stream, arguments))

            return launch

        self.launcher_cls = launcher
        properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
        self.utils = SimpleNamespace(load_binary=load_binary, get_device_properties=lambda device: properties)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 7

    def get_active_torch_device(self):
        return "cpu"

    def map_python_to_cpp_type(self, kind):
        return kind


def use(driver):
    """Make it triton's driver. Only for processes of their own: kernels remember what they were compiled for."""
    triton.runtime.driver.set_active(driver)
