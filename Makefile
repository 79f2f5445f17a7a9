# make demo   install into .venv and watch the node answer one prompt
# make msgs   build the action and messages of physai_decode_msgs into .venv; needs a C++ compiler
# make test   install the test tools into .venv; run lint, type checks and all tests
# make docs   build the documentation into site/
# make coverage  run the tests and report the lines that they cover
# make test-jazzy   run the node's tests with the Python client of ROS 2 Jazzy
# make compat compile the kernels with each Triton for each GPU; takes an hour, needs no GPU
# make real   compare native with transformers on real weights from PyPI, then ask the node
# make clean  remove all environments and generated files

PYTHON ?= python3
MACHINE ?= $(shell uname -m)
PIP = .venv/bin/python -m pip --disable-pip-version-check
FAIL = fail() { echo "physai_decode: $$1" >&2; exit 1; };

MSGS = $(wildcard physai_decode_msgs/* physai_decode_msgs/*/*) $(wildcard tools/build_msgs.*)
JAZZY_PIP = .venv-jazzy/bin/python -m pip --disable-pip-version-check
SITE = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
NODE_TESTS = $(filter-out test/test_bench.py test/test_imports.py test/test_package.py, \
	$(shell grep -l rclpy test/test_*.py))

# The tests start about 300 processes, which start faster with bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo msgs test docs coverage test-jazzy compat real lint clean supported

demo: .venv/run.stamp
	@.venv/bin/python tools/demo.py

msgs: .venv/msgs.stamp

test: .venv/test.stamp
	@if .venv/bin/python tools/build_msgs.py --check; then $(MAKE) --no-print-directory msgs; \
	else echo 'Continuing without physai_decode_msgs: the tests that need it are skipped.'; fi
	@status=0; $(MAKE) --no-print-directory lint || status=1; \
	.venv/bin/python -m pytest -n 3 --dist loadfile || status=1; exit $$status

docs: .venv/test.stamp
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build

# This includes the processes that the tests start, except those that they kill.
coverage: .venv/test.stamp
	.venv/bin/python -m pytest -n 3 --dist loadfile --cov --cov-report=term-missing:skip-covered

test-jazzy: .venv-jazzy/test.stamp
	PYTHONPATH='$(CURDIR)' .venv-jazzy/bin/python -m pytest $(NODE_TESTS)

compat: .venv/test.stamp
	.venv/bin/python tools/compat_check.py $(VERSIONS)

real: .venv/run.stamp
	.venv/bin/python tools/real_check.py $(MODEL)

lint: .venv/test.stamp
	.venv/bin/ruff check
	.venv/bin/mypy

.venv/run.stamp: .venv/bin/pip requirements.txt constraints.txt setup.py setup.cfg | supported
	@echo 'Installing into .venv; the first time, this downloads about 3 GB, most of it torch with CUDA.'
	$(PIP) install -c constraints.txt setuptools -r requirements.txt
	$(PIP) install -c constraints.txt --no-build-isolation --use-pep517 -e .
	@touch $@

.venv/test.stamp: .venv/run.stamp requirements-test.txt requirements-docs.txt
	$(PIP) install -c constraints.txt -r requirements-test.txt
	@touch $@

.venv/msgs.stamp: .venv/run.stamp requirements-msgs.txt $(MSGS)
	@.venv/bin/python tools/build_msgs.py --check
	$(PIP) install -c constraints.txt -r requirements-msgs.txt
	@.venv/bin/python tools/build_msgs.py
	@touch $@

# Its own packages come first on its path; torch, pytest and others come from .venv. The exception is
# physai_decode_msgs, which is built for another distribution there.
.venv-jazzy/test.stamp: .venv/test.stamp requirements-jazzy.txt constraints-jazzy.txt
	.venv/bin/python -m venv --clear .venv-jazzy
	$(JAZZY_PIP) install -c constraints-jazzy.txt -r requirements-jazzy.txt
	(.venv/bin/python $(SITE); echo 'import sys; sys.modules["physai_decode_msgs"] = None') \
	> "$$(.venv-jazzy/bin/python $(SITE))/shared.pth"
	@touch $@

.venv/bin/pip: | supported
	@$(FAIL) command -v '$(PYTHON)' >/dev/null || \
	fail "there is no $(PYTHON): install python3, or name a Python with 'make PYTHON=...'."; \
	'$(PYTHON)' -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || \
	fail "this needs Python 3.10 to 3.14, not $$('$(PYTHON)' --version): name one with 'make PYTHON=...'."; \
	'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || \
	fail "$(PYTHON) can't create virtual environments: install the package python3-venv."
	'$(PYTHON)' -m venv .venv

supported:
	@$(FAIL) [ '$(MACHINE)' = x86_64 ] || fail "there are no rclpy wheels for $(MACHINE): build with\
	 colcon where a ROS 2 distribution is installed, as docs/install.md and docs/howto/jetson.md say."

clean:
	rm -rf .venv .venv-jazzy .venv-compat .venv-real build install log site .coverage* *.egg-info .pytest_cache .mypy_cache .ruff_cache
