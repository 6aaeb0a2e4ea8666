#!/bin/bash
# Cloud TPU pod, one process a host:
#   TPU=NAME ZONE=us-central2-b bash experiments/launch/tpu_pod.sh sp_ngd_4k
# Every host has a checkout in ~/lbopt with its .venv, and sees DATA and RUNS (a mounted
# bucket or Filestore: paths like gs://... are not understood). The command returns once
# the processes have begun; they write to ~/lbopt/tpu_pod.log of their hosts:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 --command='tail -f lbopt/tpu_pod.log'
# and stop, after a checkpoint, by
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='kill $(cat lbopt/tpu_pod.pid)'
set -eu
# Quoted once more, since the shell of each host reads it again.
arguments=$(printf '%q ' "$@")

# --worker=all: on all hosts at once; jax asks the pod which of them is which.
# setsid, and no stream of the connection's: the run outlives the connection.
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  cd lbopt
  setsid .venv/bin/python experiments/imagenet_resnet50.py $arguments \
    --devices 0 --data-dir ${DATA:-/mnt/data} --directory ${RUNS:-/mnt/runs}/$TPU \
    --resume --distributed on >> tpu_pod.log 2>&1 < /dev/null &
  echo \$! > tpu_pod.pid"
