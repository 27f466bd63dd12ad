"""Builds the compiled CPU kernel (kernels/littlebit_cpu) where it can; everything else is in setup.cfg and pyproject.toml.

The kernel needs a C++17 compiler and no torch: it declares the C functions of torch's stable ABI itself (torch_abi.h), and
finds them when it is loaded into a process that has torch. So an isolated build, which has no torch, builds it too, and the
wheel is py3-none-<platform>: one library for every Python and every torch from 2.10 on. It is optional: without a compiler
the install goes on, one warning says so, and hf_littlebit.kernels computes in plain torch.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "hf_littlebit.kernels.liblittlebit_cpu"
SOURCE = "kernels/littlebit_cpu"
FILES = (
    "binding",
    "layer",
    "latents",
    "generic",
    "x86",
    "amx",
    "neon",
    "table_binding",
    "table",
    "table_x86",
    "table_bf16",
)
HEADERS = (
    "littlebit",
    "kernels",
    "factor",
    "latents",
    "torch_abi",
    "binding",
    "table",
    "table_kernels",
    "table_avx512",
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
                "packed layers run in plain torch. To get it, install gcc or clang for C++17, and hf-littlebit again."
            )

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise NotImplementedError("Microsoft's compiler is not supported")
        ext.extra_compile_args += ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-unused-parameter"]
        if sys.platform == "darwin":
            ext.extra_link_args += ["-undefined", "dynamic_lookup"]
        else:
            ext.extra_link_args += ["-Wl,--no-as-needed", self.stand_in(), "-Wl,--unresolved-symbols=ignore-all"]
        super().build_extension(ext)

    def stand_in(self) -> str:
        """An empty library with the name of torch's: the loader then looks for the missing functions in torch's own."""
        folder = Path(self.build_temp) / "stand-in"
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "empty.cpp"
        source.write_text("")
        objects = self.compiler.compile([str(source)], output_dir=str(folder))
        library = folder / "libtorch_cpu.so"
        soname = f"-Wl,-soname,{library.name}"
        self.compiler.link_shared_object(objects, str(library), extra_preargs=[soname], target_lang="c++")
        return str(library)

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
            depends=[f"{SOURCE}/{header}.h" for header in HEADERS],
            language="c++",
        )
    ],
    cmdclass={"build_ext": OptionalBuild, "bdist_wheel": PlainWheel},
)
