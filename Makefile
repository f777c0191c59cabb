# Two commands for newcomers: `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Byte code is made as it is imported: most of what is installed never is. Where none may be written,
# as in many containers, each of hundreds of processes would compile all of JAX and PyTorch again.
unexport PYTHONDONTWRITEBYTECODE
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt
STAMPS := $(VENV)/.installed

.PHONY: demo test test-all mini eval validate lint format types bench clean

demo: $(STAMPS)-core
	$(BIN)/python examples/demo.py --output out/demo.mp4

# In the end, where nothing is uncommitted, the commit that passed is in .venv/.green.
test: $(STAMPS)-dev lint types
	$(BIN)/python -m pytest -n 2 -m "not slow"
	@git diff --quiet HEAD 2>/dev/null && test -z "$$(git status --porcelain)" \
	  && git rev-parse HEAD > $(VENV)/.green || true

# What make test leaves out, too, and all of it compiled as users' programs are; some of it takes Ray.
test-all: $(STAMPS)-ray $(STAMPS)-compile lint types
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n 2

# The committed example holds its plots and videos inside the page.
EXAMPLE := docs/examples/validation
validate: $(STAMPS)-dev
	$(BIN)/python test_jax_port.py --num_tests 2 --output_dir $(EXAMPLE)
	rm -rf $(EXAMPLE)/raw $(EXAMPLE)/*.png $(EXAMPLE)/*.mp4 $(EXAMPLE)/plan.json

# The small models of the package, from nothing; stopped, it goes on. Hours on a CPU.
mini: $(STAMPS)-dev
	$(BIN)/python -m skyreels_jax.mini.make

eval: $(STAMPS)-core
	$(BIN)/python -m skyreels_jax.evaluation.quality

lint: $(STAMPS)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMPS)-dev
	$(BIN)/basedpyright

format: $(STAMPS)-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMPS)-dev
	$(BIN)/python -m benchmarks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: a second run installs nothing again. The demo takes the core alone,
# without PyTorch; the tests compare with PyTorch.
$(STAMPS)-core: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

$(STAMPS)-dev: $(STAMPS)-core
	$(PIP) -e '.[torch,validation,train,dev]'
	touch $@

$(STAMPS)-ray: $(STAMPS)-dev
	$(PIP) -e '.[ray]'
	touch $@

$(STAMPS)-compile: $(STAMPS)-dev
	$(PIP) -e '.[compile]'
	touch $@

clean:
	rm -rf $(VENV) out
