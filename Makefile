# Two commands do everything: `make demo` and `make test`. Both set up what they need first.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
WORKERS := 2
# a file's tests go to one worker, which makes its fixtures once
PARALLEL := $(VENV)/bin/pytest -q -n $(WORKERS) --dist loadfile
APT := bpftool clang-16 containernetworking-plugins etcd-server iproute2 iptables iputils-ping libbpf-dev linux-libc-dev nftables python3 python3-venv tcpdump util-linux
APT_UML := kmod user-mode-linux
APT_LOAD := stress-ng

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-plugin test test-unit test-bpf test-modes test-node test-scale test-uml test-load test-order lint wheel clean

help:  ## list what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 22

setup: $(VENV)/.ready  ## install Debian packages and the virtual environment (done by the others as needed)

$(VENV)/.ready: pyproject.toml Makefile
	@./scripts/setup.sh $(VENV) $(APT)
	@touch $@

demo: setup  ## the main job, end to end: pods on one node, connected and protected by eBPF (root)
	@$(PY) -m ciliate.lab.demo

demo-plugin: setup  ## a third party's plugin: wheel, listed, checked, used by an agent (root)
	@./scripts/demo-plugin.sh $(PY)

test: lint test-unit test-bpf test-node test-scale  ## everything below (root)

lint: setup  ## ruff, mypy, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test-unit: setup  ## tier unit: needs nothing but Python
	$(VENV)/bin/pytest -q tests/unit

test-bpf: setup  ## tier bpf: needs root and a kernel with BPF; programs run through BPF_PROG_TEST_RUN
	$(PARALLEL) tests/bpf

test-node: setup  ## tier node: needs root; real agents, CNI calls and packets in network namespaces
	$(VENV)/bin/pytest -q tests/node

test-scale: setup  ## tier scale: needs root; a real agent in a small simulated cluster
	$(VENV)/bin/pytest -q tests/scale

test-modes: setup  ## tier modes, not in `test`: needs root; every scenario on 2 and 3 nodes in each routing mode (6 min)
	$(VENV)/bin/pytest -q tests/modes

$(VENV)/.uml-ready: $(VENV)/.ready
	@./scripts/setup.sh $(VENV) $(APT_UML)
	@touch $@

test-uml: $(VENV)/.uml-ready  ## tier uml, not in `test`: needs root; the datapath and an agent on Linux 6.1 in User-mode Linux (ten minutes and more)
	$(VENV)/bin/pytest -q tests/uml

$(VENV)/.load-ready: $(VENV)/.ready
	@./scripts/setup.sh $(VENV) $(APT_LOAD)
	@touch $@

test-load: $(VENV)/.load-ready  ## tier node beside a processor load, not in `test`: three times 6 busy workers, once 16 (root; hours)
	@./scripts/test-under-load.sh $(VENV)

test-order: setup  ## every file of tests by itself in random order, not in `test` (root; longer than `test`; SEED repeats an order)
	@./scripts/test-random-order.sh $(VENV) $(sort $(wildcard tests/unit/*/test_*.py tests/unit/test_*.py tests/bpf/test_*.py tests/node/test_*.py))

wheel: setup  ## build dist/*.whl and the source archive
	$(PY) -m hatchling build

clean:  ## remove what building left in this folder
	rm -rf dist build $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
