# Sourced by the batch scripts: runs a command that Slurm may interrupt, and puts the job back into the queue then.
#
#   source slurm/requeue.sh
#   run_or_requeue srun ...
#
# Slurm sends USR1 (--signal=B:USR1@...) to the batch shell alone, ahead of the time limit and, where the site has
# set preempt_send_user_signal, ahead of a preemption. The command gets it from here, saves its work and exits with
# 75. Then the job is requeued: it keeps its number, and the same command goes on. Any other code is the job's. Of
# several processes srun tells the highest code, so that all must agree before one exits with 75.

MAX_RESTARTS=100  # a command that always ends with 75, or takes its node down, must not come back for ever
child=
signalled=
trap 'signalled=1; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || true' USR1
trap : TERM  # srun and the command get it too, and the shell has to outlive them

run_or_requeue() {
  local code=0
  if [ "${SLURM_RESTART_COUNT:-0}" -gt "$MAX_RESTARTS" ]; then
    echo "error: this job has been restarted more than $MAX_RESTARTS times; submitted again, it goes on" >&2
    exit 1
  fi
  "$@" &  # in the background, because a trap waits for a command in the foreground
  child=$!
  [ -z "$signalled" ] || kill -USR1 "$child"  # it came before there was a child
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done  # a signal ends a wait, not the child
  wait "$child" || code=$?
  case $code in
    75 | 138 | 143) requeue ;;  # interrupted, or ended by USR1 or TERM before it could handle them
  esac
  exit "$code"
}

# Put this job back into the queue and exit; return when it must not be there, or cannot.
requeue() {
  local job=$SLURM_JOB_ID state
  # one task of an array has the array's own number, and under that scontrol would requeue all of them
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
  for _ in 1 2 3 4 5; do  # the controller may be restarting
    if state=$(squeue --noheader --jobs="$job" --format=%T); then
      # cancelled, out of time, or requeued by Slurm itself; a requeue would bring a cancelled job back to life
      [ "$state" = RUNNING ] || return 0
      scontrol requeue "$job" && exit 0
    fi
    sleep 5
  done
}
