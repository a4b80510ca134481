#!/usr/bin/env bash
# Runs lmms-eval end to end on a local task and a tiny model with random weights: no download of data or weights.
#
#     bench/eval_check.sh DIR        DIR: outputs and the virtual environment (2.5 GB, some minutes)
#
# Evaluates three methods on three pictures; one further run must fail. LMMS_EVAL_PYTHON names a python with lmms-eval.
set -euo pipefail
work=$(realpath -m "${1:?expected a folder to write}")
cd "$(dirname "$0")/.."
exec </dev/null
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off
mkdir -p "$work"

python=${LMMS_EVAL_PYTHON:-$work/venv/bin/python}
if [ ! -x "$python" ]; then
  "${PYTHON:-python3}" -m venv "$work/venv"
  # lmms-eval 0.7.3 imports decord without requiring it, and names that filelock 4 does not have.
  "$python" -m pip install -q "torch==2.13.0" "lmms-eval==0.7.3" decord "filelock<4" "transformers==5.23.0"
fi
"$python" -m pip install -q --no-deps .
cp bench/evaluation/*.* "$work/"
mkdir -p "$work/site" # Python runs sitecustomize.py at start; a checkout on PYTHONPATH would shadow the installed package
cp python_tests/serving/torchvision_without_cuda.py "$work/site/"
echo "import torchvision_without_cuda" >"$work/site/sitecustomize.py"
export PYTHONPATH=$work/site
"$python" bench/evaluation/task.py "$work"

evaluate() { # MODEL_ARGS...
  (cd "$work" && "$python" -m lmms_eval --model sts_llava_hf --batch_size 1 --include_path "$work" --tasks sts_pictures \
    --output_path "$work/out" --log_samples --model_args "pretrained=$work/tiny,device=cpu,device_map=cpu,$1" 2>&1) |
    tee "$work/log" || return 1
}
for pruning in budget=32 method=divprune,budget=32 method=pyramiddrop,layers=1+2,ratios=0.5+0.25; do
  printf '\n######## %s\n' "$pruning"
  evaluate "$pruning"
  grep -q "3 of 3 prompts had images" "$work/log"
  grep -q "sts_pictures" "$work/log"
done
printf '\n######## a budget that cannot be met must end the run\n'
if evaluate method=fastv,budget=2; then
  echo "eval_check.sh: the run went on" >&2
  exit 1
fi
grep -q "sts_kernels: ValueError" "$work/log"
echo "eval_check.sh: all right"
