#!/usr/bin/env bash
# Sets the environment up if needed, then runs the demo and leaves its results in demo_out of this
# checkout. Arguments go to `ddit-rt demo`; another --out wins.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$root/.venv" "$root/scripts/setup.sh" "${DDIT_RT_EXTRAS:-demo}"
exec "$root/.venv/bin/ddit-rt" demo --out "$root/demo_out" "$@"
