# `make help` lists the targets. GNU make 3.81 or newer.

# Without PYTHON, everything shares .venv. With PYTHON=..., each version of
# Python has its own, such as .venv-3.12. `override`: it is emptied at need.
ifeq ($(origin PYTHON),undefined)
  PYTHON := python3
  override VENV := .venv
else
  override VENV := .venv-$(shell $(PYTHON) -c \
    'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
endif
VPYTHON := $(VENV)/bin/python
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:

.PHONY: help
help:  ## this list
	@echo 'make TARGET [PYTHON=python3.12] [ARGS="..."]'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' \
	  $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.installed  ## train, freeze, prune and draw on digits; ARGS=--config.seed=1
	@$(VPYTHON) -m maskconnect_jax.main --config=configs/digits.py \
	  --workdir=runs/digits $(ARGS)

.PHONY: test
test: $(VENV)/.installed-test  ## the test suite; ARGS='-k resume'
	@$(VPYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

.PHONY: slow
slow: $(VENV)/.installed-test  ## the tests that take minutes each
	@$(VPYTHON) -m pytest -n 2 --dist loadfile -m slow \
	  -o faulthandler_timeout=900 $(ARGS)

.PHONY: notebooks
notebooks: $(VENV)/.installed-notebooks  ## run the notebooks, from a wheel
	@$(VPYTHON) -m pytest -m slow tests/test_notebooks.py $(ARGS)

.PHONY: lint
lint: $(VENV)/.installed-test  ## style, formatting and types
	@$(VPYTHON) -m ruff check
	@$(VPYTHON) -m ruff format --check
	@$(VPYTHON) -m mypy

.PHONY: docs
docs: $(VENV)/.installed-docs  ## the documentation site, in build/site; every link checked
	@$(VPYTHON) -m sphinx -W --keep-going -q -b html docs build/site
	@cd build/site && ../../$(VENV)/bin/linkchecker --no-status --no-warnings \
	  --ignore-url='^https?:' index.html
	@echo 'open build/site/index.html'

.PHONY: release
release: $(VENV)/.installed-release  ## sdist and wheel in dist/, checked and tried in a clean environment
	@set -e; rm -rf dist; \
	$(VPYTHON) -m build -q; \
	$(VPYTHON) -m twine check --strict dist/*; \
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(VPYTHON) -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m pip install -qq dist/*.whl; \
	cd "$$tmp"; \
	venv/bin/maskconnect --mode=describe --config=digits >described; \
	tail -n 1 described
	@ls -l dist

.PHONY: format
format: $(VENV)/.installed-test  ## rewrite the files in the house style
	@$(VPYTHON) -m ruff check --select I --fix
	@$(VPYTHON) -m ruff format

# A line that is not name==version would tie the pins to this machine.
.PHONY: update
update:  ## renew the pins of PYTHON's version in constraints/
	@$(if $(PROBLEM),$(error $(PROBLEM)))
	@set -e; \
	tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; trap 'exit 1' INT TERM; \
	version=$$($(PYTHON) -c '$(PRINT_VERSION)'); \
	pins=constraints/py$$(echo $$version | tr -d .).txt; \
	echo "Looking for the newest versions for Python $$version"; \
	$(PYTHON) -m venv "$$tmp/venv"; \
	"$$tmp/venv/bin/python" -m pip install -qq -e '.[test,docs,notebooks,release]'; \
	"$$tmp/venv/bin/python" -m pip check -q; \
	"$$tmp/venv/bin/python" -m pip freeze --all --exclude-editable \
	  --exclude pip --exclude wheel >"$$tmp/pins"; \
	if grep -Ev '^[A-Za-z0-9._-]+==[^ @]+$$' "$$tmp/pins"; then \
	  echo "The lines above are no pins; $$pins is as it was." >&2; exit 1; \
	fi; \
	mkdir -p constraints; \
	{ echo "# Made by \`make update\` on Python $$version: the newest versions of"; \
	  echo '# everything that .[test,docs,notebooks,release] installs. Not edited by hand.'; \
	  cat "$$tmp/pins"; } >$$pins.new; \
	mv $$pins.new $$pins; \
	echo "Wrote $$pins"

.PHONY: clean
clean:  ## remove virtual environments and caches; runs/ stays
	@rm -rf .venv .venv-* build dist *.egg-info \
	  .pytest_cache .mypy_cache .ruff_cache
	@find configs maskconnect_jax tests -name __pycache__ -type d \
	  -prune -exec rm -rf {} +

PRINT_VERSION := import sys; print("%d.%d" % sys.version_info[:2])

# One line on what is wrong with PYTHON; empty when it will do.
PROBLEM = $(shell \
  $(PYTHON) -c '' >/dev/null 2>&1 || { \
    echo '$(PYTHON) does not run: name a Python 3.11 or newer,' \
      'as in make test PYTHON=python3.12'; exit; }; \
  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
    echo '$(PYTHON) is older than Python 3.11: name a newer one,' \
      'as in make test PYTHON=python3.12'; exit; }; \
  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
    echo '$(PYTHON) cannot make virtual environments: install its venv' \
      'package (on Debian and Ubuntu: apt install python3-venv)')

# The virtual environments. A stamp says what was installed, so that pip runs
# only after a change of what is to be installed. `.unfinished` is there while
# something is under way: an environment in which that was cut short is made
# anew. So is one whose Python has gone from the machine.
STAMPS := $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-docs \
  $(VENV)/.installed-release $(VENV)/.installed-notebooks
ifneq ($(shell test -x $(VPYTHON) && test ! -e $(VENV)/.unfinished && echo ok),ok)
.PHONY: $(STAMPS)
endif

$(STAMPS): setup.cfg pyproject.toml $(wildcard constraints/*.txt)

$(VENV)/.installed:
	$(call install,.)
	@touch $@

$(VENV)/.installed-test:
	$(call install,.[test])
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs:
	$(call install,.[docs])
	@touch $(VENV)/.installed $@

$(VENV)/.installed-notebooks:
	$(call install,.[test$(comma)notebooks])
	@touch $(VENV)/.installed $(VENV)/.installed-test $@

$(VENV)/.installed-release:
	$(call install,.[release])
	@touch $(VENV)/.installed $@

comma := ,

define install
	@$(if $(PROBLEM),$(error $(PROBLEM)))
	@set -e; \
	if [ -e $(VENV)/.unfinished ] || ! [ -x $(VPYTHON) ]; then \
	  echo 'Making $(VENV)'; \
	  rm -rf $(VENV); mkdir $(VENV); touch $(VENV)/.unfinished; \
	  $(PYTHON) -m venv $(VENV); \
	fi; \
	touch $(VENV)/.unfinished; \
	version=$$($(VPYTHON) -c '$(PRINT_VERSION)'); \
	pins=constraints/py$$(echo $$version | tr -d .).txt; \
	if ! [ -e $$pins ]; then \
	  pins=$(lastword $(sort $(wildcard constraints/*.txt))); \
	  echo "No pins for Python $$version: trying those of $$pins"; \
	fi; \
	echo "Installing $(1) into $(VENV), pinned by $$pins (about a minute)"; \
	$(VPYTHON) -m pip install -qq -c $$pins -e '$(1)'; \
	rm $(VENV)/.unfinished
endef
