# Everything a fresh clone needs: `make demo` and `make test`. Both keep to .venv, with the torch that TORCH= names; or,
# with PYTHON=, to an overlay of that python and the torch >= 2.11 it has, into which nothing is installed but sslkern.
TORCH ?= torch==2.13.0

VENV := $(if $(PYTHON),build/overlay,.venv)
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# Without bytecode of all that there is, most of which no one imports: Python makes what it needs, wherever it may
INSTALL := $(PY) -m pip install -q --no-compile --disable-pip-version-check
unexport PYTHONDONTWRITEBYTECODE
OURS := $(INSTALL) --no-build-isolation $(if $(PYTHON),--no-deps )-e .
# The kernels compile while pip still looks for what else there is to install; its own build then finds them made
SET_UP = ($(PY) setup.py build_ext > /dev/null & $(OURS)$(if $(PYTHON),,"[$(1)]"); status=$$?; wait; exit $$status)

# Where `make gpu` leaves its log, results and table
OUT ?= out

# The binary of `make gpu-bundle`, where there is one: on such a machine nothing is installed and nothing compiles
BUNDLE := $(wildcard build/gpu/sslkern/_C.abi3.so)

# Made for what is asked: another TORCH= or PYTHON= is set up and built for anew
READY := $(VENV)/ready-$(firstword $(shell echo "$(or $(PYTHON),$(TORCH))" | cksum))

# Tests side by side, where their tools are ours: on two cores three, as one often waits for a compiler or for ranks
PARALLEL := $(if $(PYTHON),,-n $(if $(filter 1 2,$(shell getconf _NPROCESSORS_ONLN)),3,4))

.PHONY: demo test bench gpu gpu-bundle build lint clean

demo: build
	$(PY) examples/vicreg_digits.py $(ARGS)
	$(PY) -m bench.large_batch --limit

test: $(VENV)/complete lint
	$(PY) -m pytest $(PARALLEL) $(ARGS)

bench: build
	$(PY) -m bench $(ARGS)

# On a machine with an NVIDIA GPU, in minutes: ceilings, every op, the tests, times, a profile, a sanitizer; a table last
gpu: $(if $(BUNDLE),,$(VENV)/complete)
	$(if $(BUNDLE),$(or $(PYTHON),python3),$(PY)) -m bench.gpu --out $(OUT) $(ARGS)

# What `make gpu` runs on a machine that is to compile nothing: carry the tracked files and build/gpu there
gpu-bundle: $(READY)
	SSLKERN_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 $(PY) setup.py build_ext --build-lib build/gpu
	git rev-parse --short HEAD > build/gpu/commit

build: $(VENV)/built

lint: $(VENV)/complete
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror \
	  $(filter csrc/%,$(SOURCES)) $(wildcard $(addprefix tests/simulator/*.,h cpp cu))

.venv/ready-%: Makefile
	test -x .venv/bin/python || python3 -m venv .venv
	$(INSTALL) "$(TORCH)" "setuptools>=77.0.3"
	rm -f .venv/ready*
	touch $@

build/overlay/ready-%: Makefile
	rm -rf build/overlay
	$(PYTHON) -m venv --without-pip build/overlay
	$(PYTHON) -c "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\n')" \
	  > $$(build/overlay/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/parent.pth
	touch $@

# For the torch that is there: without one for CUDA, no nvcc
$(VENV)/built: $(READY) $(SOURCES)
	$(call SET_UP,examples)
	touch $@

# What the tests need besides: their tools, and the CUDA kernels wherever there is an nvcc. It is a `built` as well
$(VENV)/complete: $(READY) $(SOURCES)
	export SSLKERN_CUDA=$${SSLKERN_CUDA:-1}; $(call SET_UP,test)
	touch $(VENV)/built $@

clean:
	rm -rf build dist *.egg-info sslkern/*.so .venv/built .venv/complete
