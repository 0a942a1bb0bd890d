# Each target does its own set-up: the virtual environment and the compiled extension.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test benchmark cpp-test cpp-test-asan cpp-test-tsan clean
.DELETE_ON_ERROR:

train: $(READY)
	$(BIN)/iqmpc train $(ARGS)

test: cpp-test cpp-test-asan cpp-test-tsan
	$(BIN)/ruff check .
	$(BIN)/pytest $(ARGS)

benchmark: $(READY)
	$(BIN)/pytest --benchmark $(ARGS)

# The C++ library's own tests, plain and under the sanitizers.
cpp-test: SANITIZE =
cpp-test-asan: SANITIZE = address,undefined
cpp-test-tsan: SANITIZE = thread
cpp-test cpp-test-asan cpp-test-tsan: $(READY)
	$(BIN)/cmake -S . -B build/$@ -DIQMPC_BUILD_PYTHON=OFF -DIQMPC_BUILD_TESTS=ON \
	  -DIQMPC_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build build/$@ --parallel 2
	$(BIN)/ctest --test-dir build/$@ --output-on-failure

# Made again when what it was made from has changed: requirements, or sources of the extension.
$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt \
          $(shell find csrc -type f -not -path 'csrc/tests/*')
	@command -v $(PYTHON) > /dev/null || \
	  { echo "$(PYTHON) is missing (Debian: apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || \
	  { echo "Python's venv is missing (Debian: apt-get install python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf build .venv iqmpc/*.so *.egg-info
