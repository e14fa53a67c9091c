# Sourced by the scripts beside it: make .venv and install into it what the caller names, once for
# each state of pyproject.toml and constraints.txt. `PYTHON` chooses the interpreter. With HASHES=FILE,
# which scripts/hashes writes, no package is taken whose hash is not in the file.
# Usage: . scripts/setup.sh; setup [EXTRA ...]

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or newer with the venv module was found (set PYTHON=/path/to/python)." >&2
  return 2
}

setup() {
  local extras wanted stamp=.venv/installed
  extras=$(IFS=,; echo "$*")
  wanted=$(cat pyproject.toml constraints.txt ${HASHES:+"$HASHES"} | sha256sum | cut -c1-16)
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python)
    echo "Making .venv with $("$python" --version)" >&2
    "$python" -m venv .venv
  fi
  if ! grep -qsx "$wanted:$extras" "$stamp"; then
    echo "Installing mosaicbert${extras:+[$extras]} (some minutes the first time)" >&2
    local pip=".venv/bin/python -m pip install -q --disable-pip-version-check"
    if [ -n "${HASHES:-}" ]; then
      $pip --require-hashes --no-deps -r "$HASHES"
      $pip --no-deps --no-build-isolation -e .
    else
      # torch first and alone, so that its pinned build is taken before anything else asks for it.
      $pip "$(grep '^torch==' constraints.txt)"
      $pip -c constraints.txt -e ".${extras:+[$extras]}"
    fi
    echo "$wanted:$extras" >>"$stamp"
  fi
}
