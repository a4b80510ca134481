"""Benchmarks of every op against its reference and the best plain PyTorch: `python -m bench --help`, README.md here."""

import os

# Before torch is imported: spinning worker threads cost milliseconds a call on a busy or virtual machine. The value in
# force is recorded with every row.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
