# mbf from a fresh clone: `make run` and `make test` set up all that they need in $(VENV).

VENV ?= .venv
RUN ?= quickstart --method slao,seqlora
PYTEST ?= -n 2 --dist loadfile
BENCH ?= bench/*.py
PEFT_SUITE ?=
METHODS ?= --budget 110
SANITIZE ?=
FUZZ ?= all

# The first Python that is new enough and can make virtual environments; `make PYTHON=/path/to/python3` overrides.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && command -v $$p && break; done)

bin := $(VENV)/bin
pip := $(bin)/python -m pip
done := $(VENV)/.done
native := setup.py csrc/ops.cpp csrc/portable.cpp csrc/portable.map $(shell find csrc/cpu -name '*.cpp' -o -name '*.h' 2>/dev/null)
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help run test peft-suite lint emulation sanitize fuzz wheel wheel-check vulnerabilities bench methods docs docs-serve clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
		|| sed -nE 's/^([a-z-]+):.*## (.*)/  make \1  \2/p' $(MAKEFILE_LIST)
	@echo
	@echo '  make run RUN="real-5 --method slao,seqlora --seed 0"    another run; see mbf run --help'
	@echo '  make test PYTEST="-x tests/ops"                         other arguments for pytest'
	@echo '  make peft-suite PEFT_SUITE="--peft-version 0.18.1"       another PEFT'
	@echo '  make sanitize SANITIZE="--calls 5000 --seed 1"           more random calls, and others'
	@echo '  make fuzz FUZZ="jsonl --inputs 100000 --seed 1"          one reader, fewer inputs'
	@echo '  make PYTHON=/usr/bin/python3.12 run                     another Python (3.10 or newer)'

run: $(done)/run $(done)/native ## install what a run needs, then learn RUN (default: the quickstart) and write its report
	$(bin)/mbf run $(RUN)

test: $(done)/test $(done)/native ## the test suite
	$(bin)/python -m pytest $(PYTEST)

peft-suite: $(done)/test $(done)/native ## PEFT's own LoRA tests with the fused layer in place of PEFT's
	$(bin)/python -m tests.peft_suite $(PEFT_SUITE)

lint: $(done)/dev ## ruff, mypy and clang-format
	$(bin)/ruff check --extend-exclude build .
	$(bin)/ruff format --check --extend-exclude build .
	$(bin)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs -r $(bin)/clang-format --dry-run -Werror

# The sanitizers' library must be the first of the process, and libstdc++ be there when it looks for its exceptions.
emulation: $(done)/test $(done)/native ## the tests of the CUDA kernels on the CPU, under AddressSanitizer and UBSan
	MBF_EMULATION_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
		$(bin)/python -m pytest --capture=sys tests/cuda --ignore tests/cuda/test_build.py

sanitize: $(done)/test $(done)/native ## the C++ of the CPU under AddressSanitizer, UBSan and LeakSanitizer, with random calls
	MBF_SANITIZE=1 MBF_BUILD_CPU=1 MBF_BUILD_CUDA=0 $(bin)/python setup.py -q build_ext
	$(bin)/python -m tests.sanitize $(SANITIZE)

# Forty minutes for all; tests.fuzz.guided READER follows branches with Atheris.
fuzz: $(done)/test $(done)/native ## a million wrong inputs for every reader of files, or those of FUZZ
	$(bin)/python -m tests.fuzz $(FUZZ)

wheel: $(done)/dev ## build the wheel and the sdist into dist/; audit the wheel, tag it for every Linux it serves, add its bill of materials
	rm -rf dist build/lib* build/bdist* build/wheel
	MBF_BUILD_CPU=1 MBF_BUILD_CUDA=$(if $(shell command -v nvcc),1,auto) \
		$(bin)/python -m build --wheel --no-isolation --outdir build/wheel
	MBF_BUILD_CPU=0 MBF_BUILD_CUDA=0 $(bin)/python -m build --sdist --no-isolation
	$(bin)/python -m tests.wheel.audit build/wheel/*.whl --output dist
	$(bin)/python -m tests.wheel.sbom dist/*.whl

# Strict: a package that the advisories do not know is an error, not a line.
vulnerabilities: $(done)/dev ## ask the public advisories for every package of the environment; needs the network
	$(bin)/pip-audit --strict --skip-editable

# Needs, beside the registry, another Python: 3.10 or from 3.12 on. Downloads stay in uv's cache.
wheel-check: wheel ## use the wheel and the sdist in clean environments: two Pythons, the pinned and the oldest torch
	$(bin)/python -m tests.wheel dist

# Material prints an advertisement against a later MkDocs unless told not to.
docs: $(done)/docs ## the documentation, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict
	@echo "site/index.html"

docs-serve: $(done)/docs ## the documentation on http://127.0.0.1:8000, built anew at each change
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs serve --strict

bench: $(done)/dev $(done)/native ## the benchmarks of bench/, or those of BENCH
	$(bin)/python -m pytest $(BENCH)

methods: $(done)/run $(done)/native ## all methods on real-5, a piece of METHODS (110 minutes) a call; at the end into bench/results/methods
	$(bin)/python bench/methods.py $(METHODS)

clean: ## remove what make built, the environment included; runs/ and the cache of models and data stay
	rm -rf $(VENV) build dist site *.egg-info mbf/_C*.so mbf/_cuda*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks

# torch comes first: building without isolation compiles against the very torch that will load the extension.
$(done)/torch: constraints.txt
	@test -n '$(PYTHON)' || { echo 'No Python >= 3.10 with venv found: install one (Debian, Ubuntu: apt install python3-venv)' \
		'or name it: make PYTHON=/path/to/python3'; exit 1; }
	test -x $(bin)/python || '$(PYTHON)' -m venv $(VENV)
	$(pip) install -c constraints.txt torch 'setuptools>=77' wheel ninja
	@mkdir -p $(done) && touch $@

# An extra's packages; the extension is left to the rule below, so that it is compiled once and not with every extra.
$(done)/run $(done)/test $(done)/docs $(done)/dev: $(done)/%: $(done)/torch pyproject.toml
	MBF_BUILD_CPU=0 $(pip) install --no-build-isolation -c constraints.txt -e '.[$*]'
	@touch $@

$(done)/native: $(done)/torch pyproject.toml $(native)
	$(pip) install --no-build-isolation --no-deps -e .
	@touch $@
