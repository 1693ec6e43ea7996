# make demo        start the Space with the models in space/checkpoints and print its address
# make quickstart  train a small GPT-2 on two CPU cores, load it again and generate text (about three minutes)
# make test        lint, format check and all tests
# make bench       compare speed and memory with other GPT-2s; options: make bench BENCH="--repeat 3 --nanogpt ~/nanoGPT"
# make install     only install into .venv, which the other commands do first
# To use another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
INSTALLED_FOR_TESTS := .venv/installed-for-tests
INSTALLED_FOR_BENCH := .venv/installed-for-bench
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: demo quickstart test bench lint install clean

# Waiting threads sleep instead of spinning, which is faster if other programs use the cores too.
demo: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python space/app.py

quickstart: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(BIN)/python examples/quickstart.py --overwrite

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Without that setting: on idle cores, spinning threads are faster.
bench: $(INSTALLED_FOR_BENCH)
	$(BIN)/python tests/benchmarks/run_all.py $(BENCH)

lint: $(INSTALLED_FOR_TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(INSTALLED)

# If Python has no ensurepip (Debian, Ubuntu), the system's pip installs one into .venv.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: $(PYTHON) is not installed; install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11, which transformers needs; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into .venv; the first time this downloads PyTorch and takes minutes."
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || \
		{ $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@$(PIP_INSTALL) -e '.[train,space]'
	@touch $@

$(INSTALLED_FOR_TESTS): $(INSTALLED)
	@echo "Installing the test dependencies, including the libraries to compare with."
	@$(PIP_INSTALL) -e '.[train,space,test]'
	@touch $@

$(INSTALLED_FOR_BENCH): $(INSTALLED)
	@echo "Installing the libraries to compare with."
	@$(PIP_INSTALL) -e '.[train,space,bench]'
	@touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist *.egg-info
