# make env    .venv with everything in it, the extension built
# make demo   explain a photograph, say where the figure is
# make test   all tests
# make simt   the CUDA kernels built for the CPU, for their tests
# make sanitize  operators and emulated CUDA kernels under the address and undefined behaviour sanitizers; races by
#                ThreadSanitizer
# make fuzz   10,000 cases of abuse of operators and loaders, under the same sanitizers, and a table of them
# make figures  the pictures of docs/figures, and the walkthrough's (some minutes)
# make bench  native against the published procedure in plain PyTorch: tables and a plot in benchmarks/results (an hour)
# make docs   the documentation as pages, build/docs/index.html: a broken link fails
# make check  what continuous integration runs beside the tests: lint, types, CUDA sources, documentation
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# Known to work together. Anything from torch 2.11 on will do: make env TORCH="torch torchvision"
TORCH ?= torch==2.11.0 torchvision==0.26.0
SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: env demo figures simt test sanitize fuzz bench docs check format clean

env: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) numpy "setuptools>=77,<82" wheel ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --config-settings editable_mode=compat -e ".[dev]"
	touch $@

demo: env
	$(BIN)/spade-fast demo --out demo

figures: env
	$(BIN)/python examples/figures.py
	$(BIN)/jupyter execute --inplace examples/walkthrough.ipynb

simt: env
	cmake -S . -B build/simt -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(abspath $(BIN))/python
	cmake --build build/simt --target spade_fast_simt_python simt_selftest
	ctest --test-dir build/simt --output-on-failure --quiet -R simt_ -E "gram|factor|prune|eliminate|render"

# Threads that wait leave their core to the other process.
test: env simt
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

sanitize: env
	cmake -S . -B build/tsan -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSPADE_FAST_SANITIZE=thread
	cmake --build build/tsan
	ctest --test-dir build/tsan --output-on-failure -j 2
	cmake -S . -B build/asan -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DSPADE_FAST_SANITIZE=address,undefined
	cmake --build build/asan
	ctest --test-dir build/asan --output-on-failure -j 2

fuzz: env
	cmake -S . -B build/asan -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -DSPADE_FAST_SANITIZE=address,undefined
	cmake --build build/asan --target spade_fast_ops
	$(BIN)/python benchmarks/fuzz.py build/asan/libspade_fast_ops.so benchmarks/results/robustness/fuzz.md

bench: env
	for name in hessian solver trace exact run; do \
	  $(BIN)/python -m pytest -q benchmarks/bench_$$name.py --benchmark-json=benchmarks/results/$$name.json && \
	  $(BIN)/python benchmarks/report.py benchmarks/results/$$name.json > benchmarks/results/$$name.md || exit 1; \
	done
	$(BIN)/python benchmarks/scaling.py

docs: env
	$(BIN)/python -m sphinx -W -n --keep-going -q -E -b html docs build/docs

check: env docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))
	$(BIN)/mypy
	$(BIN)/python .ci/compile_cuda.py

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.cpp %.h %.cu %.cuh,$(SOURCES))

clean:
	rm -rf build demo *.egg-info spade_fast/*.so $(VENV)/.built
