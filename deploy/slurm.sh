#!/usr/bin/env bash
# One job on a Slurm allocation: a Ray head on its first node, a worker on each other one.
#
#     sbatch deploy/slurm.sh python -m jobs.merge -c configs/merge/soup.yaml storage=/shared/icm_ray
#
# `icm_ray` is installed in the environment that is active when the job is sent, on a file system
# that all nodes see. A job that was killed goes on when it is sent again.
#SBATCH --job-name=icm-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
set -euo pipefail
(($#)) || { echo "usage: sbatch $0 python -m jobs.NAME -c RECIPE [key=value ...]" >&2; exit 2; }

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
port=${ICM_RAY_PORT:-6379}
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=${SLURM_GPUS_ON_NODE:-0}
address=$(srun --nodes=1 --ntasks=1 -w "${nodes[0]}" hostname -i | awk '{print $1}')

# A token that all nodes read, and nobody else; it ends with the allocation.
tokens=$(mktemp -d "$PWD/.icm-ray-XXXXXX")
trap 'rm -rf "$tokens"' EXIT
(umask 077; openssl rand -hex 32 > "$tokens/token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$tokens/token" RAY_USAGE_STATS_ENABLED=0

srun --nodes=1 --ntasks=1 --overlap -w "${nodes[0]}" \
  ray start --head --node-ip-address="$address" --port="$port" --num-cpus="$cpus" \
  --num-gpus="$gpus" --include-dashboard=false --block &
started=($!)
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 --overlap -w "$node" \
    ray start --address="$address:$port" --num-cpus="$cpus" --num-gpus="$gpus" --block &
  started+=($!)
done
trap 'kill "${started[@]}" 2>/dev/null; wait; rm -rf "$tokens"' EXIT

export RAY_ADDRESS="$address:$port"
# Until every node has joined; Ray itself waits for the head alone.
python - "${#nodes[@]}" <<'WAIT'
import sys, time
import ray
end = time.monotonic() + 300
while True:
    try:
        if not ray.is_initialized():
            ray.init(logging_level="error", log_to_driver=False)
        if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[1]):
            break
    except ConnectionError:
        pass
    if time.monotonic() > end:
        sys.exit("error: slurm.sh: not every node of the allocation joined within 300 seconds.")
    time.sleep(1)
WAIT
"$@"
