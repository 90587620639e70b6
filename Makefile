# make demo · make test · make docs · make outputs · make kills · make lab · make sync     Each sets up .venv on first use.
#   PYTHON  the interpreter to build .venv from (3.11 or newer)
#   TORCH   the build of torch, in pip's words: TORCH="torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"
PYTHON ?= python3
VENV   ?= .venv
PIP    ?= $(VENV)/bin/python -m pip
TORCH  ?=
bin     = $(CURDIR)/$(VENV)/bin
ready   = $(VENV)/.ready
one     = OMP_NUM_THREADS=1 PATH="$(bin):$$PATH"

.PHONY: demo test docs outputs kills lab sync
.DEFAULT_GOAL = demo

demo: $(ready)
	@$(bin)/cit demo

test: $(ready)
	@echo "== notebooks, modules and README agree"
	@PATH="$(bin):$$PATH" $(bin)/python tools/sync.py --check
	@echo "== ruff"
	@$(bin)/ruff check --quiet cit_workbench tests tools setup.py
	@echo "== every notebook runs, and every link of the site works"
	@$(one) $(bin)/python tools/docs.py --fresh
	@echo "== tests"
	@$(one) $(bin)/python -m pytest tests -q -n 2 --dist loadfile --durations 30

docs: $(ready)
	@$(one) $(bin)/python tools/docs.py
	@echo "the site: _site/html/index.html"

outputs: $(ready)
	@$(one) $(bin)/python tools/docs.py --hold
	@echo "the notebooks hold the outputs of this tree; nbs/outputs.json says what they were made from"

kills: $(ready)
	@$(one) $(bin)/python tests/kills.py --out records/kills.json

lab: $(ready)
	@PATH="$(bin):$$PATH" $(bin)/jupyter lab nbs

sync: $(ready)
	@PATH="$(bin):$$PATH" $(bin)/python tools/sync.py

$(ready): settings.ini constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "== installing into $(VENV) (a few minutes the first time)"
	@$(if $(TORCH),grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; $(PIP) install --quiet $(TORCH))
	@$(PIP) install --quiet -c $(if $(TORCH),$(VENV)/)constraints.txt -e '.[dev]'
	@touch $(ready)

ifneq ($(TORCH),)
.PHONY: $(ready)
endif
