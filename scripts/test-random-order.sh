#!/usr/bin/env bash
# Each file of tests by itself, its tests in random order. SEED repeats an order.
# Usage: test-random-order.sh VENV FILE...
set -euo pipefail
venv=$1
shift
seed=${SEED:-$RANDOM}
failed=()
echo "SEED=$seed"
for file in "$@"; do
    "$venv/bin/pytest" -q --random-order-bucket=module --random-order-seed="$seed" "$file" || failed+=("$file")
done
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
echo "every file passed in random order"
