#!/bin/bash
# Cloud TPU pod, one process a host:
#   TPU=NAME ZONE=us-central2-b bash experiments/launch/tpu_pod.sh sp_ngd_4k
# Every host has a checkout in ~/lbopt with its .venv, and sees DATA and RUNS (a mounted
# bucket or Filestore: paths like gs://... are not understood).
set -eu
# Quoted once more, since the shell of each host reads it again.
arguments=$(printf '%q ' "$@")

# --worker=all: on all hosts at once; jax asks the pod which of them is which.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd lbopt && exec .venv/bin/python experiments/imagenet_resnet50.py $arguments \
    --devices 0 --data-dir ${DATA:-/mnt/data} --directory ${RUNS:-/mnt/runs}/$TPU \
    --resume --distributed on"
