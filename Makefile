# Every target but size, test-cuda-build and test-floor sets up .venv first and skips what is done. PYTHON is
# any Python from 3.11 on; pip's own settings apply, for example
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for the small CPU-only torch.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
INSTALLED_TO_RUN := .venv/.installed-run
INSTALLED := .venv/.installed

CUDA_PYTHON ?= python3.12
CUDA_VENV_PYTHON := .venv-cuda/bin/python
CUDA_TREE := .venv-cuda/tree
CUDA_INSTALLED := .venv-cuda/.installed

FLOOR_PYTHON ?= python3.11
FLOOR_TREE := .venv-floor/tree
FLOOR_INSTALLED := .venv-floor/.installed

.PHONY: train test test-slow test-cuda-build test-floor lint types size aot clean
.PHONY: gpu-check gpu-rehearse gpu-walk gpu-dry-run gpu-peak kernels-doc faults

# Installs what a run needs, and no tool of development.
train: $(INSTALLED_TO_RUN)
	.venv/bin/socpo demo

# Tensors are small in tests: a second thread only waits, and dearly where the machine is busy. Two
# processes, a file each, take half as long.
PYTEST = -m pytest -q -n 2 --dist loadfile

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) $(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -m slow

# The suite and the ahead-of-time gate with the versions of constraints-cuda.txt, a CUDA build of
# torch among them, in .venv-cuda, which CUDA_PYTHON makes. It needs no card and no driver. The
# first run downloads gigabytes.
test-cuda-build: $(CUDA_INSTALLED)
	$(call copy_tree,$(CUDA_TREE))
	cd $(CUDA_TREE) && OMP_NUM_THREADS=1 ../bin/python $(PYTEST) -m "not slow"
	cd $(CUDA_TREE) && ../bin/python -m tools.aot

# The suite with the oldest version of every dependency that pyproject.toml allows, in .venv-floor. The first run
# downloads gigabytes, unless pip knows an index of CPU builds.
test-floor: $(FLOOR_INSTALLED)
	$(call copy_tree,$(FLOOR_TREE))
	cd $(FLOOR_TREE) && OMP_NUM_THREADS=1 ../bin/python $(PYTEST) -m "not slow"

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	.venv/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h csrc/simd/*

types: $(INSTALLED)
	$(VENV_PYTHON) -m mypy

size:
	$(PYTHON) tools/size.py

# 175 runs with a fault in each: killed, damaged, a server or function that misbehaves. Ten minutes.
faults: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m tools.faults

# Every Triton kernel compiled for sm_80, sm_90 and sm_100; needs no GPU.
aot: $(INSTALLED)
	$(VENV_PYTHON) -m tools.aot

# docs/kernels.md: what kernels need of a card, and their least time on paper; needs no GPU.
kernels-doc: $(INSTALLED)
	$(VENV_PYTHON) -m tools.kernels_doc

# What only a card can tell, in five minutes (MINUTES=9: all of it); exit status 2: no card. It installs and downloads
# nothing: torch, Triton, transformers and pydantic must be there, in .venv or in PYTHON. Results: runs/gpu_check.
MINUTES ?= 5
gpu-check:
	$(if $(wildcard $(INSTALLED)),$(VENV_PYTHON),$(PYTHON)) -m tools.gpu_check --minutes $(MINUTES)

# The same code from end to end where there is no card: on the CPU, with tiny sizes.
gpu-rehearse: $(INSTALLED)
	$(VENV_PYTHON) -m tools.gpu_check --rehearse --minutes 15

# Every kernel that a card would be asked to run, listed without one by a CUDA build of PyTorch.
gpu-walk: $(CUDA_INSTALLED)
	$(CUDA_VENV_PYTHON) -m tools.gpu_check.walk --markdown docs/gpu.md

# Every stage of gpu-check at its real sizes, on a card that is not there: what would fail on one, and how much memory
# it takes. PARTS="rates decode:groups" runs some of it.
PARTS ?=
gpu-dry-run: $(CUDA_INSTALLED)
	$(CUDA_VENV_PYTHON) -m tools.gpu_check.dry_run $(PARTS)

# What an update and an engine take of a card's memory, counted without one.
gpu-peak: $(CUDA_INSTALLED)
	$(CUDA_VENV_PYTHON) -m tools.gpu_check.peak

clean:
	rm -rf .venv .venv-cuda .venv-floor build dist socpo_fast.egg-info socpo_fast/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch comes first, since the extension is built against the torch that is there (hence --no-build-isolation);
# the build looks for ninja on the PATH.
$(INSTALLED_TO_RUN): setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/simd/*)
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install -q --upgrade pip
	$(VENV_PYTHON) -m pip install -q -c constraints.txt torch numpy setuptools wheel ninja
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(VENV_PYTHON) -m pip install -q -c constraints.txt --no-build-isolation -e .
	touch $@

# By its name, the package that is there gets its extra: nothing is built again. Tests compare with a module of
# verl, which needs none of what verl asks for.
$(INSTALLED): $(INSTALLED_TO_RUN)
	$(VENV_PYTHON) -m pip install -q -c constraints.txt 'socpo_fast[dev]'
	$(VENV_PYTHON) -m pip install -q -c constraints.txt --no-deps verl
	touch $@

# Where two environments have one Python, the extension that is built against the torch of
# .venv-cuda or .venv-floor has the file name of .venv's. So it is built, and tested, in a copy of
# the working tree. Without the empty PIP_EXTRA_INDEX_URL, an index of CPU builds would win over the CUDA build.
CUDA_PIP := PIP_EXTRA_INDEX_URL= "$(CURDIR)/.venv-cuda/bin/python" -m pip install -q

$(CUDA_INSTALLED): setup.py pyproject.toml constraints-cuda.txt $(wildcard csrc/* csrc/simd/*)
	test -x .venv-cuda/bin/pip || $(CUDA_PYTHON) -m venv .venv-cuda
	$(call copy_tree,$(CUDA_TREE))
	$(CUDA_PIP) --upgrade pip
	$(CUDA_PIP) -c constraints-cuda.txt torch numpy setuptools wheel ninja
	.venv-cuda/bin/python -c "import torch; assert torch.version.cuda, torch.__version__"
	cd $(CUDA_TREE) && PATH="$(CURDIR)/.venv-cuda/bin:$$PATH" \
		$(CUDA_PIP) -c constraints-cuda.txt --no-build-isolation -e '.[dev-triton36]'
	$(CUDA_PIP) -c constraints-cuda.txt --no-deps verl
	touch $@

FLOOR_PIP := "$(CURDIR)/.venv-floor/bin/python" -m pip install -q

$(FLOOR_INSTALLED): setup.py pyproject.toml constraints-floor.txt $(wildcard csrc/* csrc/simd/*)
	test -x .venv-floor/bin/pip || $(FLOOR_PYTHON) -m venv .venv-floor
	$(call copy_tree,$(FLOOR_TREE))
	$(FLOOR_PIP) --upgrade pip
	$(FLOOR_PIP) -c constraints-floor.txt torch numpy setuptools wheel ninja
	cd $(FLOOR_TREE) && PATH="$(CURDIR)/.venv-floor/bin:$$PATH" \
		$(FLOOR_PIP) -c constraints-floor.txt --no-build-isolation -e '.[dev-triton36]'
	$(FLOOR_PIP) -c constraints-floor.txt --no-deps verl
	touch $@

# $(call copy_tree,FOLDER): the working tree without what git ignores; extensions that FOLDER has stay.
define copy_tree
	mkdir -p $(1)
	find $(1) -type f ! -name '*.so' -delete
	git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C $(1)
endef
