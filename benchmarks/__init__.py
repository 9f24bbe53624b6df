"""`python -m benchmarks.run` and `.step` measure, `python -m benchmarks.report` turns it into tables and figures."""

import os

# Read when OpenMP is loaded, so before any import. One thread each unless a case says more, and waiting threads sleep:
# spinning workers of one library would count as everybody's CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
