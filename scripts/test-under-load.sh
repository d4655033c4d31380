#!/usr/bin/env bash
# The node tier beside a processor load: three times beside 6 busy workers, once beside 16.
# Usage: test-under-load.sh VENV [PYTEST ARGUMENT...]
set -euo pipefail
venv=$1
shift
[ $# -gt 0 ] || set -- tests/node
failed=0
for workers in 6 6 6 16; do
    stress-ng --cpu "$workers" --quiet &
    stress=$!
    trap 'kill "$stress" 2>/dev/null || true' EXIT
    echo "== beside stress-ng --cpu $workers"
    "$venv/bin/pytest" -q "$@" || failed=$((failed + 1))
    kill "$stress"
    wait "$stress" 2>/dev/null || true
done
echo "$failed of 4 runs failed"
[ "$failed" -eq 0 ]
