#!/usr/bin/env bash
# Submits the whole way from songs to a continuation as a chain of jobs, from the project's folder:
#
#   bash slurm/submit_all.sh IN OUT DS CK [OPTION...]
#
# IN songs, OUT chunks, DS dataset, CK checkpoints. Options go to every sbatch, such as --partition=gpu. Flags for
# the four scripts come from PREPROCESS_FLAGS, DATASET_FLAGS, TRAIN_FLAGS and GENERATE_FLAGS:
#
#   TRAIN_FLAGS="--preset large" bash slurm/submit_all.sh IN OUT DS CK --account=us
#
# A job starts when the one before it has succeeded, and is cancelled when that one failed. The last one continues a
# song that training has not heard: CK/continuation.wav. The same command, later, goes on with what is there.
set -euo pipefail

[ $# -ge 4 ] || { echo "usage: bash slurm/submit_all.sh IN OUT DS CK [OPTION...]" >&2; exit 2; }
songs=$1 chunks=$2 dataset=$3 checkpoints=$4 options=("${@:5}") python=${PYTHON:-.venv/bin/python}

# submit NAME [SCRIPT WORD...]: a job of SCRIPT, or of what comes on the standard input, after the one before it.
job=
submit() {
  job=$(sbatch --parsable --job-name="$1" ${job:+--dependency=afterok:$job --kill-on-invalid-dep=yes} \
    "${options[@]}" "${@:2}")
  job=${job%%;*}  # between clusters the name of one follows
  echo "$1: job $job"
}

submit preprocess slurm/preprocess.sbatch "$songs" "$chunks" ${PREPROCESS_FLAGS:-}
submit create_dataset <<EOF
#!/usr/bin/env bash
#SBATCH --ntasks=1 --cpus-per-task=4 --mem=16G --time=04:00:00
#SBATCH --requeue --open-mode=append --output=%x-%j.out
set -euo pipefail
source slurm/requeue.sh
run_or_requeue srun ${python@Q} create_dataset.py \
  --output_folder ${chunks@Q} --dataset_folder ${dataset@Q} ${DATASET_FLAGS:-}
EOF
submit train slurm/train.sbatch "$dataset" "$checkpoints" ${TRAIN_FLAGS:-}
submit generate <<EOF
#!/usr/bin/env bash
#SBATCH --ntasks=1 --gpus=1 --cpus-per-gpu=4 --mem-per-gpu=16G --time=01:00:00
#SBATCH --requeue --open-mode=append --output=%x-%j.out
set -euo pipefail
source slurm/requeue.sh
song=\$(${python@Q} scripts/demo_report.py song ${dataset@Q})
run_or_requeue srun ${python@Q} generate.py --checkpoint_folder ${checkpoints@Q} --input ${songs@Q}/"\$song" \
  --output ${checkpoints@Q}/continuation.wav --with_input ${GENERATE_FLAGS:-}
EOF
