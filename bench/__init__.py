"""Benchmarks of every op against its reference and plain PyTorch: `python -m bench --help`, bench/README.md."""

import os

# Must be set before torch is imported. Spinning worker threads cost milliseconds per call on a busy or virtual machine.
# Every row records the value.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
