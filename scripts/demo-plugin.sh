#!/usr/bin/env bash
# A third party's plugin, from its source to an agent that uses it, in a virtual environment of its own.
# Usage: demo-plugin.sh PYTHON   (the Python that has the build tools). Needs root and the package index.
set -euo pipefail
cd "$(dirname "$0")/.."
case $1 in /*) build=$1 ;; *) build=$PWD/$1 ;; esac
work=$(mktemp -d -t ciliate-plugin-XXXXXX)
lab=plugin-demo-$$
bin=$work/venv/bin

clean_up() {
    if [ -x "$bin/ciliate" ]; then "$bin/ciliate" lab down --force --name "$lab" >/dev/null; fi
    rm -rf "$work"
}
trap clean_up EXIT

tell() { printf '\n%s\n' "$*"; }
show() {
    printf '    $ %s\n' "$*"
    "$bin/$1" "${@:2}" | sed 's/^/      /'
}

tell "1. Two wheels: Ciliate's, and that of examples/third-party-plugin, which is another distribution."
"$build" -m hatchling build -t wheel -d "$work/wheels" >/dev/null 2>&1
(cd examples/third-party-plugin && "$build" -m hatchling build -t wheel -d "$work/wheels" >/dev/null 2>&1)
ls "$work/wheels" | sed 's/^/      /'

tell "2. Both are installed in an empty virtual environment."
python3 -m venv "$work/venv"
"$bin/pip" install --quiet --disable-pip-version-check "$work"/wheels/*.whl
show ciliate --version

tell "3. The plugin is listed beside the shipped one, without being imported."
show ciliate plugins list --kind kvstore

tell "4. It is checked by the same kit as the shipped ones."
show ciliate plugins check journal

tell "5. An agent uses it: three pods get their identities through it."
show ciliate lab up --name "$lab" --set kvstore=journal examples/demo/pods.yaml
export CILIATE_SOCKET_PATH=/run/ciliate-lab/$lab/run/ciliate.sock
show ciliate status
show ciliate plugins list --kind kvstore --agent
grep -q 'id/' "/run/ciliate-lab/$lab/state/kvstore.jsonl"

tell "6. It is exchanged for the shipped one while pods run, and back."
show ciliate plugins switch kvstore embedded
show ciliate plugins switch kvstore journal
show ciliate endpoint list

tell "7. Everything is taken down."
show ciliate lab down --name "$lab"
