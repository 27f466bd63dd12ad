# `make demo` and `make test` set up everything they need in .venv; the first run installs, later ones work offline.
PYTHON ?= python3
# Pinned, so that a tested build is used. On Linux, PyPI's wheel brings CUDA libraries; a smaller CPU build comes with
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
CHECK := $(filter-out %/binding.cpp,$(wildcard kernels/littlebit_cpu/*.cpp))

.PHONY: demo test lint asan valgrind neon bench-cpu bench-gpu check-gpu clean

$(VENV)/.installed: pyproject.toml setup.cfg setup.py $(wildcard kernels/littlebit_cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf-littlebit needs Python 3.11 or later; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet $(TORCH)
	$(RUN) -m pip install --quiet --editable '.[dev,optimum]'
	touch $@

# Triton's interpreter tests the GPU kernels on a CPU. A torch for GPUs has brought its own; elsewhere than on Linux there is none.
$(VENV)/.triton: $(VENV)/.installed
	$(RUN) -c 'import triton' 2>/dev/null || \
	  $(RUN) -m pip install --quiet "triton>=3.7; sys_platform == 'linux' and platform_machine == 'x86_64'"
	touch $@

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(RUN) examples/demo.py --out demo-output

# One thread: on few or shared cores, threads that wait for each other cost more than they bring.
test: $(VENV)/.triton
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

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
	rm -rf $(VENV) demo-output build dist *.egg-info src/*.egg-info
