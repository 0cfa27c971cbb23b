#!/usr/bin/env bash
# Train on every machine of a TPU VM (pod slice): bash launch/tpu-vm.sh NAME ZONE [jaxlm train arguments]
# Copies this checkout to each machine, installs jaxlm[tpu] and runs the same command there; JAX finds the other machines.
# --workdir must be a place that all of them see. Exit 75 (preempted after saving) and 1 (a machine was lost) are tried again.
#   JAXLM_RETRIES  times to try again (default 20)
set -euo pipefail
if (($# < 2)); then
    echo "usage: bash launch/tpu-vm.sh NAME ZONE [jaxlm train arguments]" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

on_all() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
tar --exclude=.git --exclude=.venv --exclude=runs -czf "$archive" .
gcloud compute tpus tpu-vm scp "$archive" "$name:jaxlm.tar.gz" --zone="$zone" --worker=all
on_all 'mkdir -p jaxlm && tar -xzf jaxlm.tar.gz -C jaxlm && cd jaxlm && source launch/setup.sh tpu'

train="cd jaxlm && .venv/bin/jaxlm train$(printf ' %q' "$@")"
for ((try = 0; ; try++)); do
    code=0
    on_all "$train" || code=$?
    if ((code != 75 && code != 1)) || ((try >= ${JAXLM_RETRIES:-20})); then
        exit "$code"
    fi
    echo "tpu-vm.sh: exit $code; starting again" >&2
done
