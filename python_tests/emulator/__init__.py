"""The CUDA kernels run on the CPU, and on a GPU without torch; `calls` and `smoke` are where to start reading."""

import sys
from pathlib import Path

# cases.py and oracle.py lie beside this package, whichever way it is imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
