#!/usr/bin/env bash
# A script of launch/ on all workers of a TPU VM pod slice, one process per worker.
#
#   TPU=ramp ZONE=us-west4-a ACCELERATOR=v5litepod-16 VERSION=v2-alpha-tpuv5-lite NFS=10.0.0.2:/share \
#     bash launch/cluster/tpu_pod.sh allocate --model=/mnt/ramp/DIR ... --output=/mnt/ramp/FILE
#   ... bash launch/cluster/tpu_pod.sh --dry_run allocate ...     # prints the commands, asks nobody
#
# NFS is a share in the pod's network, which lies at /mnt/ramp on every worker and holds model and output. The slice is
# made of spot VMs where it is not there, and made again as often as it is preempted; the job then goes on where it was.
# The slice is left running at the end. What is installed on workers is the last commit.
set -euo pipefail
cd "$(dirname "$0")/../.."

dry_run=
if [ "${1:-}" = --dry_run ]; then
  dry_run=yes
  shift
fi
if [ $# -eq 0 ] || [ ! -f "launch/$1.py" ]; then
  echo "error: name a script of launch/ first, as in: bash $0 allocate --model=/mnt/ramp/DIR ..." >&2
  exit 1
fi
for name in TPU ZONE ACCELERATOR VERSION NFS; do
  if [ -z "${!name:-}" ]; then
    echo "error: $name is not set; the head of $0 shows an example." >&2
    exit 1
  fi
done
name="$1"
shift
shared=/mnt/ramp
archive="${TMPDIR:-/tmp}/ramp-$TPU.tar.gz"

run() {
  if [ -n "$dry_run" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
vm() { run gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$ZONE"; }
# Empty where there is no such slice; what else is wrong `create` says.
state() { gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" --format='value(state)' 2>/dev/null || true; }

# Python 3.11 or newer comes through uv: images have older ones. All of it may be done twice.
setup="mkdir -p ramp && tar -xzf ramp-$TPU.tar.gz -C ramp \
&& python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python=3.11 ramp/.venv \
&& python3 -m uv pip install --quiet --python=ramp/.venv --editable './ramp[tpu]' \
&& { mountpoint -q $shared || { sudo apt-get install -qq nfs-common && sudo mkdir -p $shared \
&& sudo mount -t nfs $NFS $shared; }; }"
job="cd ramp && $(printf '%q ' .venv/bin/python "launch/$name.py" "$@" --hosts=auto)"

while true; do
  found=
  [ -n "$dry_run" ] || found=$(state)
  case "$found" in
    PREEMPTED | TERMINATED) vm delete "$TPU" --quiet ;;
  esac
  [ "$found" = READY ] || vm create "$TPU" --accelerator-type="$ACCELERATOR" --version="$VERSION" --spot
  run git archive --format=tar.gz --output="$archive" HEAD
  if vm scp "$archive" "$TPU:" --worker=all && vm ssh "$TPU" --worker=all --command="$setup" &&
    vm ssh "$TPU" --worker=all --command="$job"; then
    exit
  fi
  if [ "$(state)" = READY ]; then
    echo "error: the job failed; once its cause is gone, the same command goes on where it was." >&2
    exit 1
  fi
  echo "The slice was preempted: making it again." >&2
done
