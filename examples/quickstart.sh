#!/usr/bin/env bash
# The study of examples/quickstart.yaml from launch to statement; `make quickstart` runs this after installing everything.
# It can be run again at any time: a study that was cut off goes on where it stopped, a finished one is only shown.
set -euo pipefail
cd "$(dirname "$0")/.."

sweep=${SWEEP:-.venv/bin/sweep}
study=define-words

# `status` fails for a study that does not exist; `resume` has nothing to do for a finished one.
if "$sweep" status "$study" >/dev/null 2>&1; then
    echo "The study $study exists: resuming it. To start afresh, delete studies.db and the folder runs/."
    "$sweep" resume "$study"
else
    "$sweep" launch examples/quickstart.yaml --yes
fi

echo
"$sweep" best "$study"
echo
"$sweep" statement "$study"
echo
echo "Next, look at all trials, or spend two more cents on the same study:"
echo "    $sweep trials $study"
echo "    $sweep resume $study --cap '\$0.06'"
