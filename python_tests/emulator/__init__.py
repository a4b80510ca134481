"""The CUDA kernels on the CPU, and on a GPU without torch. Start reading at `calls` and `smoke`."""

import sys
from pathlib import Path

# cases.py and oracle.py lie beside this package, whichever way it is imported.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
