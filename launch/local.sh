#!/usr/bin/env bash
# One machine with any number of GPUs, TPU chips, or none. Arguments go to jaxalign.main; the same command resumes.
#
#   launch/local.sh --config configs/tsa.py
#   launch/local.sh --config configs/tsa.py:vdit_l --config.data.source=FOLDER --config.codec.weights=FOLDER \
#       --config.mesh.fsdp=8
#
# The other launchers start this file on every machine, so that the flags below stand in one place only.
# Settings, by environment:
#   DETERMINISTIC=1  a GPU gives the same bits each time, as exact resumption needs; costs speed (default 0)
#   PROCESSES=N      N processes on this machine that share its GPUs evenly (default: one process for all)
#   RESTARTS=N       start again up to N times when a process was killed or lost (default 0)
#   LOST_AFTER=S     seconds of silence after which a process counts as lost (default 60)
#   PYTHON=...       the interpreter (default python)
#   ACCELERATOR=...  gpu, tpu or cpu (default: what is found)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_accelerator() {
    if [[ -e /dev/nvidiactl || -e /dev/dxg ]]; then
        echo gpu
    elif compgen -G '/dev/accel*' >/dev/null || [[ -n ${TPU_WORKER_ID:-} ]]; then
        echo tpu
    else
        echo cpu
    fi
}

ACCELERATOR=${ACCELERATOR:-$(find_accelerator)}
case $ACCELERATOR in
gpu)
    flags=(
        # Collectives run beside the matrix products that do not need them yet. They are asynchronous by default;
        # without this scheduler nothing is moved between their start and their end.
        --xla_gpu_enable_latency_hiding_scheduler=true
        # The blocks are a loop, and fsdp gathers a block's weights inside it. With two blocks in one turn of the loop
        # the next block's weights travel while this one computes.
        --xla_gpu_enable_while_loop_double_buffering=true
        # Small collectives are put together up to so many bytes; the loop's many biases and norms travel as one.
        --xla_gpu_all_gather_combine_threshold_bytes=134217728
        --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
        --xla_gpu_all_reduce_combine_threshold_bytes=134217728
    )
    if [[ ${DETERMINISTIC:-0} == 1 ]]; then
        # No atomic sums, in cuDNN and cuBLAS neither, and no choice of kernels by timing them.
        flags+=(--xla_gpu_deterministic_ops=true)
    fi
    export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
    # Nothing else runs on the GPU, so nearly all of its memory is taken at once and does not fragment.
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
    # cuDNN's flash attention needs no flag: the config's `attention: auto` takes it in bf16 on Ampere and newer.
    ;;
tpu)
    # Collectives overlap with computation, also over several steps of it. libtpu has flags of its own. A TPU gives the
    # same bits each time without any.
    flags=(
        --xla_tpu_enable_async_collective_fusion=true
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
        --xla_tpu_enable_async_collective_fusion_multiple_steps=true
        --xla_tpu_overlap_compute_collective_tc=true
        --xla_enable_async_all_gather=true
    )
    export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"
    ;;
cpu) ;;
*)
    echo "error: ACCELERATOR=$ACCELERATOR: write gpu, tpu or cpu" >&2
    exit 2
    ;;
esac

PROCESSES=${PROCESSES:-1}
RESTARTS=${RESTARTS:-0}
run=("${PYTHON:-python}" -m jaxalign.main --lost_after="${LOST_AFTER:-60}" "$@")
if ((PROCESSES == 1 && RESTARTS == 0)); then
    exec "${run[@]}"
fi

# ---- More than one process, or one to be started again: this shell stays and looks after them.

free_port() {
    "${PYTHON:-python}" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

gpus_of() { # the GPUs of process $1 as 0,1,…
    local count each
    count=$(nvidia-smi --list-gpus | wc -l)
    if ((count % PROCESSES)); then
        echo "error: PROCESSES=$PROCESSES does not divide the $count GPUs of this machine" >&2
        exit 2
    fi
    each=$((count / PROCESSES))
    seq -s, $(($1 * each)) $((($1 + 1) * each - 1))
}

pids=()
asked_to_stop=0
stop_all() {
    asked_to_stop=1
    kill -TERM "${pids[@]}" 2>/dev/null
}
trap stop_all TERM INT

start_all() {
    local k coordinator
    pids=()
    if ((PROCESSES > 1)); then
        coordinator=127.0.0.1:$(free_port)
    fi
    for ((k = 0; k < PROCESSES; k++)); do
        if ((PROCESSES == 1)); then
            "${run[@]}" &
        else
            (
                export JAX_COORDINATOR_ADDRESS=$coordinator JAX_NUM_PROCESSES=$PROCESSES JAX_PROCESS_ID=$k
                if [[ $ACCELERATOR == gpu ]] && command -v nvidia-smi >/dev/null; then
                    JAX_LOCAL_DEVICE_IDS=$(gpus_of "$k") || exit 2
                    export JAX_LOCAL_DEVICE_IDS
                fi
                exec "${run[@]}"
            ) &
        fi
        pids+=($!)
    done
}

# Sets `status`: 0 if all finished, else what says most: a mistake in the input (2) before a loss (3, or a kill).
wait_all() {
    local pid one
    status=0
    for pid in "${pids[@]}"; do
        wait "$pid"
        one=$?
        while kill -0 "$pid" 2>/dev/null; do # a signal to this shell ends `wait` early
            wait "$pid"
            one=$?
        done
        if ((one != 0 && (status == 0 || one < status))); then
            status=$one
        fi
    done
}

for ((attempt = 0; ; attempt++)); do
    start_all
    wait_all
    # 0: done. 1 and 2: a defect or a mistake, which another start would only meet again. 130, 143: somebody's wish.
    if ((asked_to_stop || status <= 2 || status == 130 || status == 143 || attempt >= RESTARTS)); then
        exit "$status"
    fi
    echo "launch: ended with status $status; starting again ($((attempt + 1)) of $RESTARTS)" >&2
done
