"""The suite takes as many processes as there are cores: each computes in one thread; set before torch is imported."""

import os

os.environ |= {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
