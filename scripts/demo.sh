#!/usr/bin/env bash
# The whole way on two CPU cores: the pretrained weights continue a song, their core is
# trained on its songs for a few minutes, and they continue it again.
#
#   bash scripts/demo.sh              with songs that it synthesises
#   bash scripts/demo.sh FOLDER       with your own: a dozen or more, up to a few hours (the
#                                     training's minutes include encoding them)
#
# Everything is written under demo/. What is already there is kept: a second run installs, preprocesses and
# trains nothing again. For a fresh start delete demo/.
set -euo pipefail
unset CDPATH  # where it is exported, cd may go elsewhere, and prints

STEPS=200  # a machine that is busy with other things does as many as fit into the time
TRAINING_MINUTES=4
LEARNING_RATE=3e-4  # a seventh of that from scratch, which makes trained weights worse at first
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}  # threads that spin slow each other down on a busy machine
SAMPLE_RATE=12000  # Hz; the network hears and plays up to half of it
START_SECONDS=10   # where the input begins in the held-out song

if [ $# -gt 0 ]; then
  [ -d "$1" ] || { echo "error: there is no folder $1" >&2; exit 2; }
  songs=$(cd -- "$1" && pwd)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=demo/synthetic
[ -z "${songs:-}" ] || work="demo/$(basename "$songs")-$(cksum <<<"$songs" | cut -d ' ' -f 1)"
python=.venv/bin/python

step() { printf '\n== %s\n' "$*"; }

step "environment"
bash scripts/setup.sh

if [ -z "${songs:-}" ]; then
  songs=$work/songs
  step "demo songs in $songs"
  if [ ! -d "$songs" ]; then  # made aside, then renamed: an interrupted run leaves no half folder
    "$python" scripts/make_demo_songs.py --output_folder "$songs.part"
    mv "$songs.part" "$songs"
  fi
fi

step "preprocess: songs to 10-second chunks"
"$python" preprocess.py --input_folder "$songs" --output_folder "$work/chunks" --sample_rate "$SAMPLE_RATE"

step "create_dataset: chunks to pairs, split by song"
"$python" create_dataset.py --output_folder "$work/chunks" --dataset_folder "$work/dataset" \
  --val_fraction 0.2 --test_fraction 0.2

song=$songs/$("$python" scripts/demo_report.py song "$work/dataset")
# continue_song NAME FLAG...: the next 10 seconds of the held-out song, behind the 10 that were heard
continue_song() {
  "$python" generate.py "${@:2}" --input "$song" --start "$START_SECONDS" --with_input \
    --output "$work/$1.mp3" --plot "$work/$1.png"
}

step "generate: the next 10 seconds of a song that training will not hear, with the pretrained weights"
continue_song before

step "train: the core, from these weights, $STEPS steps, at most $TRAINING_MINUTES minutes"
"$python" train.py --dataset_folder "$work/dataset" --checkpoint_folder "$work/checkpoints" --preset tiny \
  --init_from pretrained --stage1_from pretrained/tiny.pt --stage2_steps "$STEPS" --joint_share 0 --eval_steps 100 \
  --learning_rate "$LEARNING_RATE" --max_minutes "$TRAINING_MINUTES"

step "generate: the same, with what was trained"
continue_song after --checkpoint_folder "$work/checkpoints"

cat <<EOF

== done
input:                        $song (its seconds $START_SECONDS to $((START_SECONDS + 10)))
with the pretrained weights:  $work/before.mp3, $work/before.png
trained on the songs:         $work/after.mp3, $work/after.png
training curves:              $work/checkpoints/curves.png

Listen for the join at 10 seconds: beat, notes and loudness should go on. The network plays copies of the input, in every
frequency band those at whose lag the input has repeated itself best.

EOF
"$python" scripts/demo_report.py figures "$work/checkpoints"
