#!/bin/bash
# Slurm, one process a GPU:  sbatch --nodes=4 experiments/launch/slurm.sh sp_ngd_4k
# What follows the script goes to the experiment. DATA and RUNS lie on a file system that
# all nodes see.
#SBATCH --job-name=lbopt
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
# As many processes as GPUs: each takes the GPU of its rank on the node.
#SBATCH --ntasks-per-node=8
# For reading and decoding images.
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# SIGTERM to the processes (not to this script) two minutes before the end, to save.
#SBATCH --signal=TERM@120
# The job may begin again, also after a node failed; its log is then continued.
#SBATCH --requeue
#SBATCH --open-mode=append

# srun does not take this from the batch job by itself.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# A requeued job keeps its number, so it finds its checkpoints.
directory=${RUNS:-runs}/$SLURM_JOB_ID

# 0: the others may end by themselves, each with its message, once one has ended.
srun --kill-on-bad-exit=0 \
  python experiments/imagenet_resnet50.py "$@" --devices 0 \
  --data-dir "${DATA:-data}" --directory "$directory" --resume --distributed on
code=$?

# 75: stopped by SIGTERM and saved, so go on later. 69, 134 and 137: a process was lost
# or killed; begin again, but not for ever, since srun does not tell what the lost
# process died of. Any other failure waits for somebody.
again=no
case $code in
  75) again=yes ;;
  69 | 134 | 137) [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-20}" ] && again=yes ;;
esac
if [ "$again" = yes ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
