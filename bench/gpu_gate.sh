#!/usr/bin/env bash
# Builds, tests, checks and measures on this machine's GPU, without network: bench/README.md. --help lists the options.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
# The toolkit is often there without being on the PATH.
export PATH="$PATH:/usr/local/cuda/bin"
exec "$PYTHON" -m bench.gpu "$@"
