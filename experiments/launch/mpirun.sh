#!/bin/bash
# Open MPI, one process a GPU:  bash experiments/launch/mpirun.sh HOSTFILE 8 sp_ngd_4k
# HOSTFILE has a host a line; 8 is the processes on each, as many as it has GPUs. What
# follows goes to the experiment. DATA and RUNS lie on a file system that all hosts see.
set -eu
hosts=$1 each=$2
shift 2
# Process 0 is on the first host. Open MPI 5 does not tell the others where that is.
read -r first _ < "$hosts"

# --hostfile, --map-by: so many processes on each host, in the order of the file.
# -x: variables that the processes get too.
exec mpirun --hostfile "$hosts" --map-by "ppr:$each:node" \
  -x PATH -x JAX_COORDINATOR_ADDRESS="$first:${PORT:-55527}" \
  python experiments/imagenet_resnet50.py "$@" --devices 0 \
  --data-dir "${DATA:-data}" --directory "${RUNS:-runs}/mpirun" \
  --resume --distributed on
