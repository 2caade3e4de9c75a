# Every target works on a fresh machine: it makes .venv, installs what it needs, and runs. A second call is fast.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

# The studies whose results stand in the repository: `make studies` runs them, `make studies STUDY="raft log_ratio"` some.
STUDIES := kl_placement token_level_kl grpo_notation off_policy raft log_ratio interactions over_optimisation scale_check
STUDY ?= $(STUDIES)
ARCHIVES := grid/studies/results
PYTEST := $(BIN)/python -m pytest

.PHONY: help install demo test bits-test check format docs slurm-test fault-test browser-test parity-test bench bench-gpu gpu-proof bench-statistics studies results clean

help:
	@echo "make demo          train the quickstart grid and write its report"
	@echo "make test          the test suite"
	@echo "make bits-test     the tests of equal bits, with narrower kernels than the processor's"
	@echo "make check         formatting, lint, types, import rules"
	@echo "make docs          tables in the READMEs that are made from the code"
	@echo "make slurm-test    a private Slurm cluster and its suite (needs apt)"
	@echo "make fault-test    kills, full disks, hostile folders, an installed wheel"
	@echo "make browser-test  the report and the live page in headless Chromium (needs apt)"
	@echo "make parity-test   gradients against TRL and verl, in an environment of their own"
	@echo "make bench         benchmarks"
	@echo "make gpu-proof     the first ten minutes on a GPU: everything that only a GPU can show, on one page"
	@echo "make bench-gpu     benchmarks of a model of real size on one GPU"
	@echo "make studies       trains the studies behind grid/studies/RESULTS.md, one after another (hours); again: continues"
	@echo "make results       writes grid/studies/RESULTS.md from the archives that make studies keeps"
	@echo "make bench-statistics  error rates, coverage and power of the report's verdicts"

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/installed

demo: $(VENV)/installed
	$(BIN)/klab launch grid/studies/quickstart.yaml --on local
	$(BIN)/klab report runs/quickstart --over updates --over tokens

test: $(VENV)/installed
	$(PYTEST) -q -n 2 --dist worksteal -m "not slurm and not faults and not browser and not parity"

# mypy and import-linter do not follow an editable installation, but links
.links: Makefile
	mkdir -p .links/klab
	for room in grid tasks harness reports; do ln -sfn ../../$$room .links/klab/$$room; done
	touch $@

# `make test` runs these with the widest kernels that the processor has. Here again with AVX2, and with the oldest ones.
bits-test: $(VENV)/installed
	MKL_CBWR=AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -q -n 2 -m bits tests/harness
	MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) -q -n 2 -m bits tests/harness

check: $(VENV)/installed .links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=.links $(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/installed
	$(BIN)/python -m klab.grid.reference
	$(BIN)/python -m tests.support.module_tables
	$(BIN)/python -m tests.support.engine_matrix

slurm-test: $(VENV)/installed
	$(BIN)/python -m tests.slurm

fault-test: $(VENV)/installed
	$(PYTEST) -q -s -m faults tests

browser-test: $(VENV)/installed
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }
	$(PYTEST) -q -m browser tests/browser

$(VENV)-parity/installed: tests/parity/requirements.txt constraints.txt pyproject.toml
	test -x $(VENV)-parity/bin/python || $(PYTHON) -m venv $(VENV)-parity
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check -r tests/parity/requirements.txt
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps verl==0.9.1
	$(VENV)-parity/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

parity-test: $(VENV)/installed $(VENV)-parity/installed
	$(VENV)-parity/bin/python -m pytest -q -m parity tests/parity
	$(PYTEST) -q -m parity tests/benchmarks tests/harness/engines

bench: $(VENV)/installed $(VENV)-parity/installed
	$(BIN)/python tests/benchmarks/update.py
	$(BIN)/python -m tests.benchmarks.against_trl
	$(BIN)/python -m tests.benchmarks.report
	$(BIN)/python -m tests.benchmarks.scale

bench-statistics: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks.error_rates

gpu-proof: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks.gpu_proof

bench-gpu: $(VENV)/installed $(VENV)-parity/installed
	$(BIN)/python -m tests.benchmarks.gpu
	$(BIN)/python -m tests.benchmarks.against_trl --setting 0.5b

# A study's archive is there as soon as it has ended, before its claims are confirmed; where none is decided there is
# nothing to confirm. Launches and confirmations that have ended are not repeated.
studies: $(VENV)/installed
	set -e; for study in $(STUDY); do \
	  $(BIN)/klab launch grid/studies/$$study.yaml --on local; \
	  $(BIN)/klab report $$study --no-figures; \
	  $(BIN)/klab archive $$study --out $(ARCHIVES)/$$study; \
	  if grep -q '^claims:' grid/studies/$$study.yaml && $(BIN)/klab confirm $$study --claims --dry-run; then \
	    $(BIN)/klab confirm $$study --claims; \
	    $(BIN)/klab report $$study-confirm-claims --no-figures; \
	    $(BIN)/klab archive $$study-confirm-claims --out $(ARCHIVES)/$$study-confirm-claims; \
	  fi; \
	done

results: $(VENV)/installed
	$(BIN)/klab results $(sort $(patsubst %/archive.json,%,$(wildcard $(ARCHIVES)/*/archive.json))) \
	  --out grid/studies/RESULTS.md --figures $(ARCHIVES)/figures --preface $(ARCHIVES)/preface.md

clean:
	rm -rf runs artefacts build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
