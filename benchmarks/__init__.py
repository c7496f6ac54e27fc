"""Where the benchmark of X is. From the root of the repository, `python -m benchmarks.ops.linear_kl` runs one of them.

run                   all of ops/ and trainer/ that compares implementations, in one table (`make bench`)
ops/                  a file for each op, under its name: its problems, its peers and its floor
  logit_kl_exactness    errors against fp64
  relation_kl_memory    peak memory against the length, a picture
trainer/              train_step, cached_step, causal_step, prune; integrations: in other packages' loops; scaling: what
                      processes send each other
studies/              whole trainings over seeds: means and deviations, a figure, a verdict in words
device/               `make gpu`: fifteen minutes with a GPU, in two runs; what they find becomes results at home
gpu/                  roofline and table make a picture and a table of results of GPUs
  compile/              kernels compiled for GPUs that need not be here
  count/                what their inner loops execute, from the machine code (`make gpu-count`)
harness/              how it is measured and told; limits: what a machine does at best
results/              every sample that README's and docs/performance.md's figures come from, or what a run printed
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# `python -m` looks here first, and finds a fastkd whose extension nobody has compiled: the installed one is measured.
if sys.path and sys.path[0] == str(ROOT):
    sys.path.append(sys.path.pop(0))
