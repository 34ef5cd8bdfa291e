# Every target does its own set-up on a fresh machine with Python 3.11 or newer.
.POSIX:
.SUFFIXES:
.PHONY: demo demo-long test lint sim exact soak clean

# The first interpreter that really starts (a pyenv shim may be there and not work).
FIND_PYTHON = for each in "$$PYTHON" python3.11 python3.12 python3 \
	"$$HOME"/.pyenv/versions/3.11*/bin/python python3.13; do \
	if "$$each" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
		>/dev/null 2>&1; then python=$$each; break; fi; done; \
	if [ -z "$$python" ]; then \
		echo "make: needs Python 3.11 or newer with venv (python3.11, python3.11-venv)" >&2; \
		exit 2; fi

demo:
	@$(FIND_PYTHON); "$$python" tools/make_environment.py demo && .venv/bin/p2ptrain demo

demo-long:
	@$(FIND_PYTHON); "$$python" tools/make_environment.py demo && .venv/bin/p2ptrain demo --long

test:
	@$(FIND_PYTHON); "$$python" tools/make_environment.py runtime export stock stock-3.13 && \
		"$$python" tools/check.py full

lint:
	@$(FIND_PYTHON); "$$python" tools/make_environment.py runtime && "$$python" tools/check.py lint

sim:
	@$(FIND_PYTHON); "$$python" tools/make_environment.py runtime && "$$python" tools/check.py sim

exact:
	@$(FIND_PYTHON); "$$python" tools/make_environment.py runtime && \
		.venv/bin/python -m tests.e2e.run_exact

soak:
	@$(FIND_PYTHON); "$$python" tools/make_environment.py runtime && \
		.venv/bin/python tools/soak.py --minutes 20

clean:
	rm -rf .venv .venv-export .venv-stock .venv-stock-3.13 build dist
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
