# shellcheck shell=bash
# Sourced by container.sbatch and bare_metal.sbatch: one task on each node, and a job that is put back into the queue
# when its time is over.
#
# SLURM sends SIGUSR1 to the batch script some minutes before the end (--signal in the scripts). The ranks are then told
# to save and leave, and the job is requeued: the same command continues from the newest checkpoint. A job that is
# cancelled, that fails, or that has done all its iterations is not requeued, nor is one that has been MAX_RESTARTS times
# (default 100). One that is preempted or loses a node is requeued by SLURM itself (--requeue).

# shellcheck source-path=SCRIPTDIR source=common.sh
source examples/slurm/common.sh

# Known here only: containers have no scontrol.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}}
# Jobs that share a node must not share a port.
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

time_is_over=0

stop_for_requeue() {
    time_is_over=1
    interrupted=1
    # The steps of the job, not this script. Not through srun: at a SIGTERM it kills its tasks at once.
    scancel --signal=TERM "$SLURM_JOB_ID"
}

# Usage: run_on_nodes SRUN_FLAGS... -- FLAGS...
run_on_nodes() {
    local srun_args=()
    while [[ $1 != -- ]]; do
        srun_args+=("$1")
        shift
    done
    shift
    trap stop_for_requeue USR1
    # SLURM cancels the steps as well: stay until they have ended.
    trap 'interrupted=1' TERM
    local status=0
    # Without the number of cores, the ranks of a node would share a single one.
    srun \
        --ntasks-per-node=1 \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" \
        --cpu-bind=none \
        --kill-on-bad-exit=1 \
        "${srun_args[@]}" \
        bash examples/slurm/node.sh "$@" &
    wait_through_signals $! || status=$?
    if ((time_is_over && status)); then
        echo "job.sh: not requeued, since the run failed as it was told to save (exit code $status)" >&2
    elif ((time_is_over && ${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-100})); then
        echo "job.sh: not requeued, since it has been $SLURM_RESTART_COUNT times: MAX_RESTARTS allows for more" >&2
    elif ((time_is_over)); then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
