#!/usr/bin/env bash
# Lint, types and tests, in an environment that it makes. Arguments go to pytest:
#
#   scripts/test.sh                      the default suite: no accelerator, nothing slow
#   scripts/test.sh tests/test_chat.py   one file
#   scripts/test.sh -m slow              the slow tests
#   PARITY=1 scripts/test.sh             with torch and transformers installed, the comparisons with them too
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

if [ -n "${PARITY:-}${CI:-}" ]; then
  make_environment all,test,parity torch==2.13.0 transformers==5.23.0
else
  make_environment all,test
fi

ruff check .
ruff format --check .
pyright
pytest -n 2 -m "not gpu and not tpu and not slow" "$@"
