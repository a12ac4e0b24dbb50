PYTHON ?= python3
# ON makes a compiler warning an error, as the CI does.
WERROR ?= OFF
# The tests look at the CUDA module's machine code, for every GPU and with a CPU build of torch too.
CUDA ?= $(if $(shell command -v nvcc),ON,AUTO)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find dancegrpo_fast kernels csrc recipes -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu*' -o -name '*.yaml' -o -name '*.jsonl') CMakeLists.txt pyproject.toml constraints.txt

# Another Triton that the kernels are compiled with: what torch 2.11 brings.
OTHER_TRITON := 3.6.0

.PHONY: help install demo test test-all lint format bench docs matrix clean

help:
	@echo "make demo    train the digit generator with GRPO: runs/digits (about 4 minutes on two cores)"
	@echo "make test    lint, types and tests of every kind, against the installed package (some 20 minutes on two cores)"
	@echo "make test-all the same and what only a release needs: tests/README.md"
	@echo "make bench   time a selection of the ops on this CPU"
	@echo "make docs    build the documentation as a site: build/site"
	@echo "make matrix  tests with other versions of Python, torch, Triton and diffusers: docs/compatibility.md"
	@echo "make install create .venv with exactly the versions in constraints.txt"

$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  (echo "PYTHON: got $$($(PYTHON) --version), want 3.11 or later (make PYTHON=python3.11 ...)" && exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch triton
	$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  e = p['optional-dependencies']; names = {'demo', 'judge', 'ocr', 'quantized', 'train', 'test', 'bench', 'docs', 'dev'}; \
	  print('\n'.join(r for n in sorted(names) for r in e[n] if not r.startswith('dancegrpo_fast')))" > $(VENV)/requirements.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement $(VENV)/requirements.txt
	rm -rf $(VENV)/triton-*
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/triton-$(OTHER_TRITON) triton==$(OTHER_TRITON)
	touch $@

# The compiled modules are linked into the source folder too, so that commands run from the repository find them.
$(VENV)/.installed: $(VENV)/.packages $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall \
	  --config-settings=cmake.define.DGF_WERROR=$(WERROR) --config-settings=cmake.define.DGF_CUDA=$(CUDA) .
	rm -f dancegrpo_fast/*.so
	ln -sf $(CURDIR)/$(VENV)/lib/python3.*/site-packages/dancegrpo_fast/_c*.so dancegrpo_fast/
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/python -m dancegrpo_fast.demo digits
	$(BIN)/dancegrpo-fast train recipes/digits.yaml --resume auto

test: install lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not release"

test-all: install lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(VENV)/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find kernels csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

format: $(VENV)/.packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find kernels csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

bench: install
	$(BIN)/pytest bench/ops -m "not full"

docs: $(VENV)/.packages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# light, or heavy: the cells whose torch brings gigabytes of CUDA.
CELLS ?= light
matrix: $(VENV)/.packages
	$(BIN)/nox --tags $(CELLS)

clean:
	rm -rf $(VENV) build runs dancegrpo_fast/*.so
