#!/usr/bin/env bash
# Train on this machine: bash launch/local.sh [--config=FILE] [--workdir=DIR] [--config.key=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
case " $* " in *" --config="*) ;; *) set -- --config=configs/shakespeare.py "$@" ;; esac
case " $* " in *" --workdir="*) ;; *) set -- --workdir=runs/local "$@" ;; esac
exec jaxlm train "$@"
