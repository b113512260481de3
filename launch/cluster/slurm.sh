#!/usr/bin/env bash
# A script of launch/ on several nodes of a SLURM cluster, one process per node.
#
#   sbatch --nodes=4 launch/cluster/slurm.sh allocate --model=DIR --source_policy=fisher --budget_gb=3.7 --output=FILE
#   bash launch/cluster/slurm.sh --dry_run allocate ...     # prints the command of a job
#
# Submit from the root of the project, in a folder that all nodes see and whose environment is RAMP_VENV (default
# .venv). Partition, account, memory and devices are flags of sbatch. A job that is preempted, loses a node or comes to
# its time limit is queued again and goes on where it was; output is appended to the same file.
#SBATCH --job-name=ramp
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
set -euo pipefail

dry_run=
if [ "${1:-}" = --dry_run ]; then
  dry_run=yes
  shift
fi
if [ $# -eq 0 ] || [ ! -f "launch/$1.py" ]; then
  echo "error: name a script of launch/ first, as in: sbatch --nodes=4 $0 allocate --model=DIR ..." >&2
  exit 1
fi
name="$1"
shift
# The step ends where one process does: what is lost is lost for all, and the next run goes on with what was kept.
command=(srun --kill-on-bad-exit=1 "${RAMP_VENV:-.venv}/bin/python" "launch/$name.py" "$@" --hosts=auto)

if [ -n "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
trap 'scontrol requeue "$SLURM_JOB_ID"; exit 1' USR1
"${command[@]}" &
wait $!
