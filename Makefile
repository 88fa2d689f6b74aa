# make demo | test | test-fast | test-all | test-stock | test-newest | test-transformers | lint | docs | operators | benchmark.  PYTHON=python3.11 chooses the interpreter.
SHELL := bash -o pipefail
VENV := .venv
STOCK := .venv-stock
NEWEST := .venv-newest
DOCS := .venv-docs
TRANSFORMERS := $(VENV)/newest-transformers
PY := $(VENV)/bin/python
DEMO := configs/demo/mask_rcnn_swin_pc.py
DEMO_CONFIGS := $(DEMO) $(wildcard configs/demo/_base_/*)
WORK := work_dirs/demo/mask_rcnn_swin_pc
DTYPE := float32
BATCH := 1
REPEATS :=
TABLES := results/benchmark
, := ,
tests = $(patsubst %,tests/test_%.py,$(1))
CORE := $(call tests,condition parsing rules fold preconditioner spectral multihead kernels swin)
# Run test files in parallel processes, each with one thread.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
# Settings that are those of the tool unless they are given.
SETTINGS = $(if $(filter-out float32,$(DTYPE)),--dtype $(DTYPE)) $(if $(filter-out 1,$(BATCH)),--batch $(BATCH)) \
    $(if $(REPEATS),--repeats $(REPEATS))
REQUIREMENTS := pyproject.toml $(filter-out requirements/docs.txt,$(wildcard requirements/* projects/mmcv_ext/*.toml projects/mmcv_ext/mmcv/*))

.PHONY: help setup demo test test-fast test-slow test-all test-stock test-newest test-transformers lint docs operators \
    test-operators benchmark

help:
	@echo "make setup       .venv with all packages; most other targets begin with it"
	@echo "make demo        train, evaluate and draw a preconditioned Mask R-CNN on the built-in data"
	@echo "make test        the tests, up to 15 minutes on two cores"
	@echo "make test-fast   the core, on one model of each library, in less than two minutes"
	@echo "make test-all    the tests and their repetitions, up to 40 minutes"
	@echo "make test-stock  the tests on OpenMMLab's own releases, in an environment of their own"
	@echo "make test-newest  core tests and short trainings on the newest torch that pip offers, in an environment of their own"
	@echo "make test-transformers  the tests of Hugging Face models, with the newest release of them"
	@echo "make lint        ruff, the types of the core, and the directions of imports"
	@echo "make docs        the documentation as a site, in site/; a broken link or reference is an error"
	@echo "make test-operators  compile mmcv's operators, and compare those on torchvision with them"
	@echo "make operators   compile mmcv's operators, 15 to 20 minutes on two cores; not needed for anything here"
	@echo "make benchmark   the tables of results/benchmark anew, for an idle machine"
	@echo "                 on a GPU: make benchmark DTYPE=bfloat16 BATCH=8 REPEATS=30 TABLES=results/benchmark/gpu"

setup: $(VENV)/.installed

$(VENV)/.installed: $(REQUIREMENTS)
	requirements/install.sh $(VENV) default
	@touch $@

$(STOCK)/.installed: $(REQUIREMENTS)
	requirements/install.sh $(STOCK) stock
	@touch $@

$(NEWEST)/.installed: $(REQUIREMENTS)
	requirements/install.sh $(NEWEST) newest
	@touch $@

operators: setup
	requirements/operators.sh $(VENV)

test-operators: operators
	$(PY) -m pytest tests/test_mmcv_ops.py tests/test_mmcv_ops_sampling.py tests/test_mmcv_ext.py

demo: $(WORK)/metrics.txt
	@echo
	@grep -oE 'coco/(bbox|segm)_mAP: [0-9.]+' $<
	@echo "checkpoint   $$(cat $(WORK)/last_checkpoint)"
	@echo "evaluation   $<"
	@echo "pictures     $(WORK)/pictures  (left: ground truth, right: prediction)"
	@echo "data         data/digit_scenes"

$(WORK)/trained: $(DEMO_CONFIGS) | setup
	@[ ! -e $@ ] || rm -r $(WORK)  # remove a finished run whose configuration has changed
	$(PY) tools/train.py $(DEMO) --work-dir $(WORK) --resume
	@touch $@

$(WORK)/metrics.txt: $(WORK)/trained
	$(PY) tools/test.py $(DEMO) "$$(cat $(WORK)/last_checkpoint)" --work-dir $(WORK) --show-dir $(WORK)/pictures \
	    | tee $@.part
	@mv $@.part $@

test test-slow test-stock: export OMP_NUM_THREADS = 1
# Without it, tests of a package that cannot be imported are skipped.
test test-slow: export STACK_TO_TEST = default
test-stock: export STACK_TO_TEST = stock

test: setup
	$(PY) -m pytest $(PARALLEL)

# -k selects one model each of timm, torchvision, mmdet, mmseg, mmpretrain and transformers, by the ends of test names.
test-fast: setup
	$(PY) -m pytest $(CORE) $(call tests,first_forward walk contributing metafile) \
	    -k 'not test_walk and not interpreter or xcit] or swintransformer] or maxvit] or segformer]'

test-slow: setup
	$(PY) -m pytest -m slow $(PARALLEL)

test-all: test test-slow

test-stock: $(STOCK)/.installed
	$(STOCK)/bin/python -m pytest $(PARALLEL)

# The tests of the core and of mmcv's operators, and one short training each of the detector and the segmenter.
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest $(CORE) $(call tests,methods mmcv_ops mmcv_ops_sampling mmcv_ext tools)

# Installed outside the environment, because mmpretrain, and with it mmdet, cannot be imported with this release.
$(TRANSFORMERS)/.installed: | setup
	$(PY) -m pip --disable-pip-version-check install -q --target $(TRANSFORMERS) -c requirements/torch.txt 'transformers>=5,<6'
	@touch $@

test-transformers: $(TRANSFORMERS)/.installed
	PYTHONPATH="$(CURDIR)/$(TRANSFORMERS)" $(PY) -m pytest tests/test_walk.py tests/test_hosts.py -k transformers

lint: setup
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache

$(DOCS)/.installed: requirements/docs.txt
	"$${PYTHON:-python3}" -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@touch $@

# Without --quiet, with which mkdocs would not count warnings.
docs: $(DOCS)/.installed
	PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict
	@echo "the site is in site/; open site/index.html"

# Each table, with its command, replaces the one in $(TABLES) when it is complete; figures and plots stay in work_dirs.
define measure
	@mkdir -p $(TABLES) work_dirs/$(TABLES)
	@{ echo '$$ python tools/analysis/benchmark.py $(strip $(2) $(SETTINGS))'; echo; \
	    $(PY) tools/analysis/benchmark.py $(strip $(2) $(SETTINGS)) --out work_dirs/$(TABLES)/$(1).json; } \
	    | tee work_dirs/$(TABLES)/$(1).txt
	@cp work_dirs/$(TABLES)/$(1).txt $(TABLES)/$(1).txt
endef

benchmark: setup
	$(call measure,train,--models upstream$(,)none:plain$(,)none$(,)pc$(,)sc$(,)sc+pc)
	$(call measure,infer,--models upstream$(,)none$(,)pc$(,)sc:folded --mode infer)
	$(call measure,mask_rcnn,--models upstream$(,)pc --network mask-rcnn --repeats 3)
	$(call measure,mask_rcnn_infer,--models upstream$(,)pc --network mask-rcnn --mode infer --repeats 3)
	$(call measure,vit,--models upstream$(,)pc --network vit-b --repeats 3)
	$(call measure,vit_infer,--models upstream$(,)pc --network vit-b --mode infer --repeats 3)
	$(call measure,attention,--models upstream$(,)none$(,)pc --network attention)
	$(call measure,ct,--models "none$(,)ct$(,)ct(form=\"newton_schulz\")")
	$(call measure,ct_vit,--models "none$(,)ct$(,)ct(form=\"newton_schulz\")" --network vit-b --size 224 --repeats 9)
	$(call measure,ct_small_vit,--models "none$(,)ct$(,)ct(form=\"newton_schulz\")" --network small-vit --batch 64 --repeats 60)
	$(call measure,sweep,--models upstream$(,)pc --sweep --repeats 2)
	@echo "the tables are in $(TABLES)"
