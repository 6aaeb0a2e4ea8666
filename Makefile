# Two commands on a machine that has only Python 3.11+, pip and make:
#   make demo    trains a small network with SP-NGD and with SGD, and draws both
#   make test    runs everything that is checked

PYTHON ?= python3
VENV   ?= .venv
RUN     = $(VENV)/bin/python
export OPENBLAS_NUM_THREADS = 1

# uv installs several times faster than pip; pip does it where uv cannot be had. Bytecode
# is made at once, as pip does: else each process of the tests compiles jax anew where
# PYTHONDONTWRITEBYTECODE is set.
define install
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make a virtual environment: install your system's python3-venv"; \
	  exit 1; }
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "installing .[$(1)] into $(VENV)"
	@{ $(RUN) -m pip install -q --disable-pip-version-check uv && \
	   $(VENV)/bin/uv pip install -q --compile-bytecode --python $(RUN) -e ".[$(1)]"; } || \
	  $(RUN) -m pip install -q --disable-pip-version-check -e ".[$(1)]"
	@touch $@
endef

.PHONY: help demo test slow lint notebooks docs bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

$(VENV)/.demo: pyproject.toml
	$(call install,data$(COMMA)experiments)

$(VENV)/.test: pyproject.toml
	$(call install,data$(COMMA)experiments$(COMMA)test)

$(VENV)/.notebooks: pyproject.toml
	$(call install,data$(COMMA)experiments$(COMMA)notebooks)

$(VENV)/.docs: pyproject.toml
	$(call install,docs)

$(VENV)/.bench: pyproject.toml
	$(call install,data$(COMMA)experiments$(COMMA)bench)

COMMA := ,

demo: $(VENV)/.demo  ## train a small network with SP-NGD and with SGD
	$(RUN) experiments/imagenet_resnet50.py demo

test: $(VENV)/.test  ## all checks that fit in minutes
	$(RUN) -m pytest -q -n 2 --dist loadfile -m "not slow"

slow: $(VENV)/.test  ## the checks that take longer
	$(RUN) -m pytest -q -m slow

lint: $(VENV)/.test  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

notebooks: $(VENV)/.notebooks  ## run the notebooks and keep their outputs
	$(RUN) -m notebooks.execute

docs: $(VENV)/.docs  ## the site, in docs/_build/html
	$(RUN) -m sphinx -W -q -c docs -d docs/_build/doctrees . docs/_build/html
	@echo "open docs/_build/html/index.html"

bench: $(VENV)/.bench  ## step times beside plain SGD and kfac-jax
	$(RUN) -m benchmarks.step_time

clean:  ## remove what these commands made
	rm -rf $(VENV) runs data .pytest_cache .ruff_cache
