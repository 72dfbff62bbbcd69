#!/usr/bin/env bash
# From nothing but Python >= 3.11 to a fine-tuned model: makes an environment and a tiny random model in the released
# format, then converts, fine-tunes, samples and exports it. A few minutes on two CPU cores, installs aside.
#
#   scripts/quickstart.sh [DIRECTORY]    runs/quickstart if not given; the same command again goes on where it stopped
#
# The text is the source code of Python's standard library, which every machine has.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

out=${1:-runs/quickstart}
released=$out/released model=$out/v4jax run=$out/finetune exported=$out/exported
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# FILE is what a command writes last: without it, what a cut-off try left beside it is removed, and the command runs.
unless_there() {
  local file=$1
  shift
  if [ ! -e "$file" ]; then
    rm -rf "$(dirname "$file")"
    "$@"
  fi
}

sample() {
  v4jax generate "$1" --prompt $'import os\n\n\ndef ' --max-new-tokens 96 --temperature 0.6 --seed 1
}

say "Environment (.venv)"
make_environment train,plot
SECONDS=0
mkdir -p "$out"

say "1. A tiny random model in the released format: FP8 dense, FP4 experts"
unless_there "$released/tokenizer_config.json" python scripts/make_tiny_checkpoint.py "$released"

say "2. Convert it to a v4jax directory"
unless_there "$model/conversion.json" v4jax convert "$released" "$model"

say "3. What it writes before training"
sample "$model"

say "4. Fine-tune it on the standard library's source code"
v4jax finetune "$model" --data stdlib --out "$run" --recipe quickstart

say "5. What it writes now"
sample "$run/model"

say "6. Export to the Hugging Face format"
unless_there "$exported/config.json" v4jax convert "$run/model" "$exported" --to hf

say "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
cat <<END
  $released    random weights, released format
  $model       the same, converted
  $run/model   fine-tuned
  $run/loss.png, metrics.jsonl: the curve
  $exported    fine-tuned, Hugging Face format: AutoModelForCausalLM.from_pretrained("$exported")

Try:  source .venv/bin/activate
      v4jax info $run/model
      v4jax generate $run/model --prompt "class Parser:"
      v4jax evaluate $run/model --data stdlib --sequence-length 256 --held-out-fraction 0.03
END
