# `make demo` and `make test` are all that a newcomer needs; both create the environment first if it is missing.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help env demo test lint types wheel-test support bench bench-attention bench-reduction bench-reduction-long \
  bench-decoding bench-refinement results sweep sweep-times decoding-results refinement-results localisation docs clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY) ## create or update the virtual environment (a torch in range that is already there is kept)

$(READY): pyproject.toml constraints.txt scripts/environment.py
	$(PYTHON) scripts/environment.py $(VENV)
	@touch $@

demo: env ## run the quickstart recipe: baseline and patched variants on the bundled model
	$(BIN)/lmmhooks run quickstart

test: env ## the whole test suite, offline
	$(BIN)/python -m pytest -n logical --maxprocesses 8 $(PYTEST_FLAGS)

lint: env ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env ## mypy over both packages
	$(BIN)/python -m mypy

wheel-test: env ## build the wheel, install it elsewhere and use it from another folder
	$(BIN)/python -m pytest -m packaging

support: env ## run the conformance matrix and store what ran where, for `lmmhooks methods` and the README
	$(BIN)/python -m pytest -q tests/conformance --write-support lmmhooks/support.json

# Depths that two CPU cores manage; on an accelerator give LAYERS=32 and more rounds.
LAYERS ?= 8
VISION_LAYERS ?= 24
ATTENTION_LAYERS ?= 4
ATTENTION_ROUNDS ?= 3
ATTENTION_METHODS ?= --method "var(sink_dims='any', skip_layers=())" --method "act(heads='all', skip_layers=())" \
  --method gift --method "fix-imbalance(gamma=1.0, start=0)" --method "cmai(focus_layer=0)" \
  --method "pai(gamma=1.0, start=0)" --method "vaf(start=0, end=$(ATTENTION_LAYERS))" --method "adaptvis(weight=0.5)" \
  --method spin --method "heads-guided(start=0, end=$(ATTENTION_LAYERS))" --method vhr --method memvr \
  --method adaptvis --method vista --method pai
ROUNDS ?= 5
DTYPE ?= bfloat16
BENCH = $(BIN)/lmmhooks bench --layers $(LAYERS) --vision-layers $(VISION_LAYERS) --repeat $(ROUNDS) --dtype $(DTYPE)
RESULTS := docs/benchmarks

bench: env ## measure the tables of docs/benchmarks again (best on an idle machine), then run `make docs`
	$(BENCH) --config llava-1.5-7b-shape --decode-tokens 8 --method "var(sink_dims='any')" \
	  --method "fastervlm(keep=64)" --method "fastv(keep=64)" --out $(RESULTS)/llava-1.5-7b.json
	$(BENCH) --config llava-1.5-7b-shape --no-disabled --method vcd --out $(RESULTS)/llava-1.5-7b-branches.json
	$(BENCH) --config llava-next-7b-shape --no-disabled --decode-tokens 4 --method "var(sink_dims='any')" \
	  --out $(RESULTS)/llava-next-7b.json
	$(BIN)/python scripts/measure_harness.py --out $(RESULTS)/harness.json

# Every attention method at 2,400 visual tokens, in all layers it may edit, so that what a layer costs is not diluted. A
# smaller decoder than 7B, beside which an edit weighs more, and next to no tower. Those in the second line read the prompt
# twice or more by design.
bench-attention: env ## measure the table of attention methods (best on an idle machine), then run `make docs`
	$(BIN)/lmmhooks bench --config qwen2.5-vl-3b-shape --visual-tokens 2400 --layers $(ATTENTION_LAYERS) --vision-layers 1 \
	  --repeat $(ATTENTION_ROUNDS) --dtype $(DTYPE) --decode-tokens 4 --no-disabled $(ATTENTION_METHODS) \
	  --out $(RESULTS)/attention-qwen2.5-vl-3b.json

# Every reducer at the same true budget, a third as in the papers' rows of 192 tokens, so that the decoder does the same
# work under all and what differs is selection. Cuts inside the decoder are as early as 8 layers need for it. Towers
# that attend in windows refuse the second group. The third keeps all tokens in the prompt and saves work or memory.
BUDGET ?= 0.333
REDUCTION_LAYERS ?= 8
REDUCTION_ROUNDS ?= 3
REDUCTION_METHODS ?= $(foreach id,random uniform-grid pool downsample fastervlm vtc-cls hiprune hired visionzip \
  prumerge vispruner divprune cdpruner holov scope vmtc tome-post vscan v2drop \
  fitprune,--method "$(id)(budget=$(BUDGET))") \
  --method "mmtok(words='tokens', budget=$(BUDGET))" --method "fastv(layer=1, budget=$(BUDGET))" \
  --method "dart(layer=1, budget=$(BUDGET))" --method "pyramiddrop(layers=(1, 2, 4), budget=$(BUDGET))" \
  --method "sparsevlm(layers=(1, 2, 4), budget=$(BUDGET))"
REDUCTION_TOWER ?= $(foreach id,tome evit flowcut,--method "$(id)(keep=$(BUDGET))") --method "ats(num_samples=193)"
REDUCTION_WHOLE ?= --method "shortv(layers=(0, 4, 5, 6, 7))" --method naavit --method yopo --method pbs \
  --method a-shape --method dyvte --method look-m --method "vl-cache(alpha=$(BUDGET))"
REDUCE = $(BIN)/lmmhooks bench --repeat $(REDUCTION_ROUNDS) --dtype $(DTYPE) --decode-tokens 2 --no-disabled
REDUCE_ALL = $(REDUCE) --layers $(REDUCTION_LAYERS) $(REDUCTION_METHODS) $(REDUCTION_WHOLE)

# Few vision layers where only the decoder is shortened, all of them where the tower is.
bench-reduction: env ## measure the tables of reducers at 576 tokens (half an hour on two idle cores), then run `make docs`
	$(REDUCE_ALL) --config llava-1.5-7b-shape --vision-layers 4 --out $(RESULTS)/reduction-llava-1.5-7b.json
	$(REDUCE) --layers 2 --vision-layers 24 --config llava-1.5-7b-shape $(REDUCTION_TOWER) --method "tome(r=8)" \
	  --method "tome(r=16)" --out $(RESULTS)/reduction-tower-llava-1.5-7b.json

# One method of every kind of selection; four decoder layers, two at 8,192 tokens, where a layer costs the
# most. Few layers weigh selection the more: at full depth it is paid once for 28 or 32 of them.
LONG_METHODS ?= $(foreach id,random fastervlm visionzip divprune,--method "$(id)(budget=$(BUDGET))") \
  --method "fastv(layer=1, keep=$(BUDGET))" --method "dart(layer=1, keep=$(BUDGET))" --method pbs
LONGEST_METHODS ?= $(foreach id,random fastervlm divprune,--method "$(id)(budget=$(BUDGET))") \
  --method "fastv(layer=1, keep=$(BUDGET))" --method pbs
REDUCE_LONG = $(REDUCE) --vision-layers 1

bench-reduction-long: env ## the same for seven methods at 2,880, 1,296 and 8,192 tokens (hours for the last), then run `make docs`
	$(REDUCE_LONG) $(LONG_METHODS) --config llava-next-7b-shape --layers 4 --out $(RESULTS)/reduction-llava-next-7b.json
	$(REDUCE_LONG) $(LONG_METHODS) --config qwen2.5-vl-7b-shape --visual-tokens 1296 --layers 4 \
	  --out $(RESULTS)/reduction-qwen2.5-vl-7b-1296.json
	$(REDUCE_LONG) $(LONGEST_METHODS) --config qwen2.5-vl-7b-shape --visual-tokens 8192 --layers 2 \
	  --out $(RESULTS)/reduction-qwen2.5-vl-7b-8192.json

# Every decoding method against one branch, the naive loop of forwards and the least its branches have to read. Few layers:
# what is paid once per token, in the language head and in the combination, weighs more than at full depth. OPERA's
# answers are longer, for it judges the first ten tokens in another way. Random weights find nearly every token plausible:
# ReVisiT, which reads visual tokens at plausible ones, gets a cut that leaves a thousand or so, and the last table, of
# lazy branches, is of the bundled models, which are trained.
DECODING_LAYERS ?= 4
DECODING_ROUNDS ?= 3
DECODING_METHODS ?= $(foreach id,vcd m3id vdd damro avisc mod sid only deco dola ritual causalmm,--method $(id)) \
  --method "revisit(beta=0.05)" \
  --method "icd(disturbance=(887, 526, 263, 9613, 1203, 1752, 29489))"
DECODE = $(BIN)/lmmhooks bench --config llava-1.5-7b-shape --layers $(DECODING_LAYERS) --vision-layers 4 \
  --repeat $(DECODING_ROUNDS) --dtype $(DTYPE) --no-disabled

bench-decoding: env ## measure the tables of decoding methods (ten minutes on two idle cores), then run `make docs`
	$(DECODE) --decode-tokens 8 $(DECODING_METHODS) --out $(RESULTS)/decoding-llava-1.5-7b.json
	$(DECODE) --decode-tokens 16 --beams 5 --method opera --out $(RESULTS)/decoding-beams-llava-1.5-7b.json
	$(BIN)/python scripts/measure_branches.py --out $(RESULTS)/decoding-lazy-tiny.json

# Whole answers of 8 tokens; the layers that are read are a fifth of a few, as they are of 32.
LOOKING_LAYERS ?= 5
LOOKING_METHODS ?= --method same-image-twice --method "carve(read_layers=(3,), max_new_tokens=8)" \
  --method "vicrop-rel(layer=2)" --method "vicrop-grad(layer=2)" --method "api(layer=3, max_new_tokens=8)" \
  --method "attwarp(layer=3, max_new_tokens=8)"

bench-refinement: env ## measure the table of methods that look before they answer (best on an idle machine), then run `make docs`
	$(BIN)/lmmhooks bench --config llava-1.5-7b-shape --layers $(LOOKING_LAYERS) --vision-layers 4 --repeat $(ROUNDS) \
	  --dtype $(DTYPE) --decode-tokens 8 --text-tokens 32 --no-disabled $(LOOKING_METHODS) \
	  --out $(RESULTS)/refinement-llava-1.5-7b.json

results: env ## run all attention methods on the bundled models again (about half an hour on two cores), then run `make docs`
	for name in llava qwen; do \
	  $(BIN)/lmmhooks run attention-scenes-$$name --out runs/attention-$$name --resume && \
	  $(BIN)/python scripts/store_results.py runs/attention-$$name --out docs/results/attention-tiny-$$name.json \
	  || exit 1; done

sweep: env ## run every reducer at equal budgets on the bundled models (about an hour), then run `make docs`
	$(BIN)/lmmhooks run reduction-sweep --out runs/reduction-llava --resume
	$(BIN)/lmmhooks run reduction-sweep-qwen --out runs/reduction-qwen --resume
	$(MAKE) sweep-times

# Times of passes that lie minutes apart compare only where nothing else runs; a few documents are enough for them.
sweep-times: env ## measure prefill times of the sweep (five minutes, idle machine), and store its results with them
	for name in llava qwen; do \
	  recipe=reduction-sweep$$([ $$name = qwen ] && echo -qwen); \
	  OMP_NUM_THREADS=1 $(BIN)/lmmhooks run $$recipe --limit 32 --out runs/times-$$name --resume && \
	  $(BIN)/python scripts/store_results.py runs/reduction-$$name --times runs/times-$$name \
	  --out docs/results/reduction-tiny-$$name.json || exit 1; done

# Greedy, five beams, and sampled under three seeds that are read as one.
KEEP = $(BIN)/python scripts/store_results.py --decoding
SEEDS := 0 1 2

decoding-results: env ## run all decoding methods and controls on the bundled models (hours on two cores), then run `make docs`
	for name in llava qwen; do \
	  case $$name in llava) suffix= ;; *) suffix=-$$name ;; esac; \
	  $(BIN)/lmmhooks run decoding-controls$$suffix --out runs/decoding-$$name --resume && \
	  $(KEEP) runs/decoding-$$name --out docs/results/decoding-tiny-$$name.json || exit 1; \
	  for seed in $(SEEDS); do \
	    $(BIN)/lmmhooks run decoding-controls-sampling$$suffix --set seed=$$seed \
	    --out runs/decoding-sampling-$$name-$$seed --resume || exit 1; done; \
	  $(KEEP) $(foreach seed,$(SEEDS),runs/decoding-sampling-$$name-$(seed)) \
	  --out docs/results/decoding-tiny-$$name-sampling.json || exit 1; done
	$(BIN)/lmmhooks run decoding-controls-beams --out runs/decoding-beams --resume
	$(KEEP) runs/decoding-beams --out docs/results/decoding-tiny-llava-beams.json

refinement-results: env ## run all methods that look again on the bundled models (an hour on two cores), then run `make docs`
	for name in llava qwen; do \
	  case $$name in llava) suffix= ;; *) suffix=-$$name ;; esac; \
	  $(BIN)/lmmhooks run refinement$$suffix --out runs/refinement-$$name --resume && \
	  $(BIN)/python scripts/store_results.py --refinement runs/refinement-$$name \
	  --out docs/results/refinement-tiny-$$name.json || exit 1; done

localisation: env ## measure where maps look on the bundled models (an hour on two cores), then run `make docs`
	$(BIN)/python scripts/measure_maps.py --recipe refinement --out docs/results/localisation-tiny-llava.json
	$(BIN)/python scripts/measure_maps.py --recipe refinement-qwen --out docs/results/localisation-tiny-qwen.json

docs: env ## regenerate the tables of README.md and docs/ from their result files
	$(BIN)/python docs/build.py

clean: ## remove caches and build products, keep the environments
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lmmhooks eval tests -name __pycache__ -type d -prune -exec rm -rf {} +
