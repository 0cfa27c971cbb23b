# shellcheck shell=bash
# Sourced by the launchers: makes .venv if needed and installs jaxlm with the extra named in $1 (may be empty).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
stamp=.venv/.installed-${1:-base}
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    .venv/bin/python -m pip install --quiet -e ".${1:+[$1]}"
    touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
