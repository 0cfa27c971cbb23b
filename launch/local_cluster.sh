#!/usr/bin/env bash
# Train with N processes on this machine: bash launch/local_cluster.sh N [jaxlm train arguments]
#   JAXLM_LOCAL_DEVICES  devices of each process: GPUs, else CPU devices (default: the GPUs shared out, else 1)
#   JAXLM_GRACE          seconds for the others to leave by themselves once one has failed (default 90), then they are killed
# Exits with the first code that is not 0. SIGTERM and SIGINT are passed on: all save and exit 75.
set -uo pipefail
n=${1:-}
if ! [[ $n =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: bash launch/local_cluster.sh N [jaxlm train arguments]: N is the number of processes" >&2
    exit 2
fi
shift
command -v jaxlm > /dev/null || source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

devices=()
if [[ ${JAX_PLATFORMS:-} != cpu ]] && command -v nvidia-smi > /dev/null; then
    IFS=, read -r -a devices <<< "${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)}"
fi
gpus=${#devices[@]}
if ((gpus)); then
    export JAXLM_LOCAL_DEVICES=${JAXLM_LOCAL_DEVICES:-$((gpus / n))}
    if ((JAXLM_LOCAL_DEVICES * n > gpus || JAXLM_LOCAL_DEVICES == 0)); then
        echo "launch/local_cluster.sh: $n processes do not fit $gpus GPUs; use at most $gpus processes" >&2
        exit 2
    fi
else
    export JAXLM_LOCAL_DEVICES=${JAXLM_LOCAL_DEVICES:-1}
    export JAX_NUM_CPU_DEVICES=$JAXLM_LOCAL_DEVICES
fi
port=${JAXLM_PORT:-$((61440 + $$ % 4096))}
export JAXLM_COORDINATOR=127.0.0.1:$port JAXLM_NUM_PROCESSES=$n

pids=()
for ((i = 0; i < n; i++)); do
    if ((gpus)); then
        CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${devices[*]:i * JAXLM_LOCAL_DEVICES:JAXLM_LOCAL_DEVICES}")
        export CUDA_VISIBLE_DEVICES
    fi
    JAXLM_PROCESS_ID=$i jaxlm train "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null' TERM INT

code=0 deadline=
running=("${pids[@]}")
while ((${#running[@]})); do
    still=()
    for pid in "${running[@]}"; do
        if kill -0 "$pid" 2> /dev/null; then
            still+=("$pid")
            continue
        fi
        wait "$pid"
        rc=$?
        if ((rc && !code)); then
            code=$rc
            deadline=$((SECONDS + ${JAXLM_GRACE:-90}))
        fi
    done
    running=("${still[@]}")
    if [[ $deadline ]] && ((SECONDS >= deadline && ${#running[@]})); then
        echo "launch/local_cluster.sh: killing ${#running[@]} of $n processes that did not leave by themselves" >&2
        kill -KILL "${running[@]}" 2> /dev/null
    fi
    sleep 0.2 &
    wait $! # a trap runs at once, not after the sleep
done
exit "$code"
