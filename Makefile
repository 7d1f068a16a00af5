# `make demo`, `make demo-va-pi`, `make demo-mar-grpo` and `make test` are all that a newcomer needs. SEED=2 changes the demo's seed, OUT=... its folder.
SEED ?= 0
SUFFIX = $(if $(filter 0,$(SEED)),,-$(SEED))
# glibc gives freed memory back after every large tensor, and faults it in again for the next; keeping it is quicker.
MEMORY = MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456

.PHONY: demo demo-va-pi demo-mar-grpo test slow check format clean setup

setup:
	@scripts/setup.sh

demo: setup
	@$(MEMORY) .venv/bin/varl demo words --out $(or $(OUT),runs/demo$(SUFFIX)) --seed $(SEED)

demo-va-pi: setup
	@$(MEMORY) .venv/bin/varl demo va-pi --out $(or $(OUT),runs/demo-va-pi$(SUFFIX)) --seed $(SEED)

demo-mar-grpo: setup
	@$(MEMORY) .venv/bin/varl demo mar-grpo --out $(or $(OUT),runs/demo-mar-grpo$(SUFFIX)) --seed $(SEED)

test: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/pytest -n 2

slow: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/pytest -m slow

check: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/pytest -n 2

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv runs
