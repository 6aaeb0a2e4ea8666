#!/bin/bash
# Open MPI, one process a GPU:  bash experiments/launch/mpirun.sh HOSTFILE 8 sp_ngd_4k
# HOSTFILE has a host a line; 8 is the processes on each, as many as it has GPUs. What
# follows goes to the experiment. DATA and RUNS lie on a file system that all hosts see.
set -eu
hosts=$1 each=$2
shift 2
# Process 0 is on the first host.
read -r first _ < "$hosts"

# jax reads the variables of Open MPI 4, but not those of Open MPI 5; it reads its own.
# shellcheck disable=SC2016  (expanded on the hosts)
python='export JAX_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE
  export JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK
  export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK
  exec python "$@"'

# --hostfile, --map-by: so many processes on each host, in the order of the file.
# -x: variables that the processes get too.
exec mpirun --hostfile "$hosts" --map-by "ppr:$each:node" \
  -x PATH -x JAX_COORDINATOR_ADDRESS="$first:${PORT:-55527}" \
  bash -c "$python" bash experiments/imagenet_resnet50.py "$@" --devices 0 \
  --data-dir "${DATA:-data}" --directory "${RUNS:-runs}/mpirun" \
  --resume --distributed on
