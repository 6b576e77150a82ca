# make run    a demo: the real agent, a reader that stalls, and what arrives over OTLP
# make test   all tests, ruff and mypy
# make backends  Prometheus, Jaeger and a Collector for the tests (make test builds them, too)
# make kernels  the kernel tests on five kernels, in virtual machines (QUICK=1: does it load and count?)
# make fuzz   10^6 records of any content through everything behind the kernel (make test does fewer)
# make soak   ten minutes of mixed load and a collector that restarts (MINUTES=60 for an hour)
# make bench  what it costs, against the alternatives
# make venv   .venv/bin/otel-tcppktlat, and bcc from the distribution

PYTHON ?= python3
VENV := .venv
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# Virtual machines compute and the other tests mostly wait: half of them at a time, side by side.
BESIDE := tests/kernel/test_other_kernels.py $(filter-out tests/telemetry/test_failures.py,$(wildcard tests/telemetry/test_*.py))
AS_ROOT := $(if $(SUDO),$(SUDO) --preserve-env,)

.PHONY: run test test-tempo backends kernels fuzz bench venv lint bcc clean

run: venv
	@$(AS_ROOT) $(VENV)/bin/python -m otel_tcppktlat.demo

venv: bcc $(VENV)/.installed

test: bcc test-tools $(VENV)/.installed-test lint backends
	$(AS_ROOT) sh -c '$(VENV)/bin/python -m pytest -q $(BESIDE) & beside=$$!; \
	  $(VENV)/bin/python -m pytest $(addprefix --ignore ,$(BESIDE)); rest=$$?; wait $$beside && exit $$rest'

fuzz: bcc $(VENV)/.installed-test
	$(AS_ROOT) env FUZZ_RECORDS=1000000 $(VENV)/bin/python -m pytest -s tests/kernel/test_any_content.py

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

backends: $(VENV)/.installed-test
	$(VENV)/bin/python -m tests.backends.build

test-tempo:
	@test -x "$(TEMPO)" || { echo "name a Tempo binary: TEMPO=path make test-tempo" >&2; exit 1; }
	@$(MAKE) --no-print-directory bcc backends
	$(AS_ROOT) $(VENV)/bin/python -m pytest -s tests/backends/tempo.py

# KERNELS="5.10 7.x" for some of them.
kernels: bcc $(VENV)/.installed-test
	$(AS_ROOT) $(VENV)/bin/python -m tests.kernel $(KERNELS) $(if $(QUICK),--quick)

soak: bcc $(VENV)/.installed-test
	$(AS_ROOT) env PYTHONPATH=tests $(VENV)/bin/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES))

bench: bcc bench-tools $(VENV)/.installed-test
	$(AS_ROOT) $(VENV)/bin/python -m tests.benchmarks

# bcc is the distribution's own package; PyPI's `bcc` is another project.
bcc:
	@/usr/bin/python3 -c 'import bcc, ensurepip; bcc.BPF' 2>/dev/null || $(MAKE) --no-print-directory install-bcc

.PHONY: install-bcc
install-bcc:
	@if command -v apt-get >/dev/null; then $(SUDO) apt-get update -qq && \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-bpfcc python3-venv >/dev/null; \
	elif command -v dnf >/dev/null; then $(SUDO) dnf install -y -q python3-bcc; \
	else echo "install your distribution's bcc for Python, then try again" >&2; exit 1; fi

# systemd-analyze reads the unit, setpriv grants what it grants; instrumented applications ask redis-server and PostgreSQL.
.PHONY: test-tools
test-tools:
	@command -v systemd-analyze >/dev/null && command -v setpriv >/dev/null && command -v redis-server >/dev/null && \
	  ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || \
	  { $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq \
	  --no-install-recommends systemd util-linux redis-server postgresql >/dev/null; }

# wrk, redis-benchmark, pgbench and iperf3 drive servers that the benchmarks start themselves.
.PHONY: bench-tools
bench-tools: test-tools
	@command -v wrk >/dev/null && command -v nginx >/dev/null && command -v iperf3 >/dev/null && \
	  command -v redis-benchmark >/dev/null || \
	  { $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq \
	  --no-install-recommends wrk nginx iperf3 redis-tools >/dev/null; }

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
