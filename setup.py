"""Builds the compiled CPU kernel (kernels/littlebit_cpu) where it can; everything else is in setup.cfg and pyproject.toml.

The kernel is optional: without a compiler, or without torch's headers, the install goes on, one warning says what is
missing, and hf_littlebit.kernels computes in plain torch. torch is no build requirement, because an isolated build would
download a second, several gigabytes large copy of it: its headers are taken from the environment that is installed into.
The library uses torch's stable ABI and no Python symbol, so it has a plain name and the wheel is py3-none-<platform>.
"""

import importlib.util
import re
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "hf_littlebit.kernels.liblittlebit_cpu"
SOURCE = "kernels/littlebit_cpu"
FILES = ("binding", "layer", "latents", "generic", "x86", "amx", "neon")
TORCH = (2, 10)  # of the stable ABI that binding.cpp is written for


def torch_folder() -> Path:
    """The folder of a torch whose headers have the stable ABI; torch itself is not imported."""
    found = importlib.util.find_spec("torch")
    folders = list(found.submodule_search_locations or []) if found else []
    # In an isolated build only the interpreter's own paths still name the environment that is installed into.
    folders += [f"{sysconfig.get_path(kind)}/torch" for kind in ("purelib", "platlib")]
    for folder in map(Path, folders):
        header = folder / "include/torch/headeronly/version.h"
        if header.exists():
            numbers = re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text())
            if tuple(map(int, numbers)) >= TORCH:
                return folder
    raise FileNotFoundError(
        f"no torch >= {TORCH[0]}.{TORCH[1]} with headers in {', '.join(dict.fromkeys(folders))}; install torch first"
    )


class OptionalBuild(build_ext):
    """build_ext for a plain shared library that may fail."""

    made = False

    def run(self) -> None:
        try:
            super().run()
            self.made = True
        except (Exception, SystemExit) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.warn(
                f"hf-littlebit: the compiled CPU kernel was not built ({lines[0]}). The package works without it, slowly: "
                "packed layers run in plain torch. With a C++17 compiler and torch >= 2.10 installed, reinstall to get it."
            )

    def build_extension(self, ext: Extension) -> None:
        folder = torch_folder()
        ext.include_dirs.append(str(folder / "include"))
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args += ["/std:c++17", "/O2"]
        else:
            ext.extra_compile_args += ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-unused-parameter"]
        ext.define_macros.append(("TORCH_TARGET_VERSION", f"0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"))
        ext.library_dirs.append(str(folder / "lib"))
        ext.libraries.append("torch_cpu")
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_outputs(self) -> list:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict:
        return {built: copy for built, copy in super().get_output_mapping().items() if Path(built).exists()}


class PlainWheel(bdist_wheel):
    """py3-none-<platform> with the library, py3-none-any without."""

    def get_tag(self) -> tuple:
        self.root_is_pure = not self.get_finalized_command("build_ext").made
        return ("py3", "none", "any") if self.root_is_pure else ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            NAME,
            [f"{SOURCE}/{file}.cpp" for file in FILES],
            depends=[f"{SOURCE}/{header}.h" for header in ("littlebit", "kernels", "latents")],
            language="c++",
        )
    ],
    cmdclass={"build_ext": OptionalBuild, "bdist_wheel": PlainWheel},
)
