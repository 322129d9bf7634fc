# Every target but size sets up .venv first and skips what is done. PYTHON is any Python from 3.11 on; pip's own
# settings apply, for example PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for the small CPU-only torch.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
INSTALLED := .venv/.installed

.PHONY: train test test-slow lint types size aot gpu-check gpu-rehearse gpu-walk clean

train: $(INSTALLED)
	.venv/bin/socpo train --config configs/molar_mass.toml

# Tensors are small in tests: a second thread only waits, and dearly where the machine is busy.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -m "not slow"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -m slow

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

types: $(INSTALLED)
	$(VENV_PYTHON) -m mypy

size:
	$(PYTHON) tests/size.py

# Every Triton kernel compiled for sm_80, sm_90 and sm_100; needs no GPU.
aot: $(INSTALLED)
	$(VENV_PYTHON) -m bench.aot

# What only a card can tell, in five minutes (MINUTES=8: all of it); exit status 2: no card. It installs and downloads
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

clean:
	rm -rf .venv build dist socpo_fast.egg-info socpo_fast/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch comes first, since the extension is built against the torch that is there (hence --no-build-isolation);
# the build looks for ninja on the PATH.
$(INSTALLED): setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/simd/*)
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(VENV_PYTHON) -m pip install -q --upgrade pip
	$(VENV_PYTHON) -m pip install -q -c constraints.txt torch numpy setuptools wheel ninja
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(VENV_PYTHON) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
