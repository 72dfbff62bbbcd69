# Sourced by the other scripts: makes .venv with the project in it, once for each set of extras.
#
#   make_environment EXTRAS [PACKAGE…]    e.g. make_environment all,test torch transformers
#
# Packages are installed before the project, so that it takes them as they are. PYTHON chooses another interpreter.

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python >= 3.11 with venv found (on Debian: apt install python3-venv); set PYTHON to one" >&2
  return 1
}

make_environment() {
  local extras=$1 python stamp wanted
  shift
  stamp=.venv/installed
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    "$python" -m venv .venv
  fi
  wanted="$extras $* $(cksum <pyproject.toml)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    if [ $# -gt 0 ]; then
      .venv/bin/python -m pip install --quiet "$@"
    fi
    .venv/bin/python -m pip install --quiet --editable ".[$extras]"
    echo "$wanted" >"$stamp"
  fi
  PATH="$PWD/.venv/bin:$PATH"
}
