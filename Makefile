# Each target does its own set-up: the virtual environment and the compiled extension.
PYTHON ?= python3
# Where torch is looked for beside pip's own index. PyPI's for Linux is the CUDA build, gigabytes:
# make train TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin
READY := .venv/.ready
TRAIN := .venv/.ready-train
DOCS := .venv/.ready-docs

.PHONY: train results docs test test-newest benchmark cpp-test cpp-test-asan cpp-test-tsan clean
.DELETE_ON_ERROR:

train: $(TRAIN)
	$(BIN)/iqmpc train $(ARGS)

# The runs of docs/results, hours; goes on where it was stopped: make results ARGS="--jobs 2"
results: $(READY)
	$(BIN)/python docs/results/run.py $(ARGS)

# The documentation's site, build/site; a broken link or reference fails it. Nothing is fetched.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test: cpp-test cpp-test-asan cpp-test-tsan
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	find csrc examples tests/native -name '*.[ch]pp' -o -name '*.[ch]' -o -name '*.cu*' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/pytest $(ARGS)

# The core and DMControl against the newest releases that they are known to work with (NumPy 2);
# MyoSuite and ManiSkill2 hold NumPy below it.
test-newest: .venv-newest/.ready
	.venv-newest/bin/pytest -m "not slow" $(ARGS)

benchmark: $(READY)
	$(BIN)/pytest --benchmark $(ARGS)

# The C++ library's own tests, plain and under the sanitizers.
cpp-test: SANITIZE =
cpp-test-asan: SANITIZE = address,undefined
cpp-test-tsan: SANITIZE = thread
cpp-test cpp-test-asan cpp-test-tsan: $(READY)
	$(BIN)/cmake -S . -B build/$@ -DIQMPC_BUILD_PYTHON=OFF -DIQMPC_BUILD_TESTS=ON \
	  -DIQMPC_SANITIZE=$(SANITIZE) -DIQMPC_CUDA=AUTO
	$(BIN)/cmake --build build/$@ --parallel 2
	$(BIN)/ctest --test-dir build/$@ --output-on-failure

# Made again when what it was made from has changed: requirements, or sources of the extension.
SOURCES := pyproject.toml setup.py CMakeLists.txt \
           $(shell find csrc -type f -not -path 'csrc/tests/*')
$(TRAIN) $(DOCS) $(READY): CONSTRAINTS = constraints.txt
# imageio (video): gymnasium's MuJoCo tasks do not import without it.
$(TRAIN): EXTRA = dmcontrol,plots,video
$(DOCS): EXTRA = docs
$(READY): EXTRA = test
$(READY): ALSO = $(TRAIN)
$(TRAIN) $(DOCS) $(READY): constraints.txt $(SOURCES)
.venv-newest/.ready: CONSTRAINTS = constraints-newest.txt
.venv-newest/.ready: EXTRA = test-newest
.venv-newest/.ready: constraints-newest.txt $(SOURCES)

$(TRAIN) $(DOCS) $(READY) .venv-newest/.ready:
	@command -v $(PYTHON) > /dev/null || \
	  { echo "$(PYTHON) is missing (Debian: apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || \
	  { echo "Python's venv is missing (Debian: apt-get install python3-venv)"; exit 1; }
	@test -x $(@D)/bin/python || \
	  $(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
	  { echo "$$($(PYTHON) --version) will not do: DMControl needs Python 3.10 to 3.12 (its labmaze" \
	    "has no wheel for newer ones): make PYTHON=python3.12 ..."; exit 1; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[$(EXTRA)]'
	@touch $@ $(ALSO)

clean:
	rm -rf build .venv .venv-newest iqmpc/*.so *.egg-info
