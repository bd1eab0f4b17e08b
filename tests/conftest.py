"""Every test runs on one thread, so that its floating-point sums have one order.

Set through the environment, before anything heavy is imported: the oldest-runtime job has no torch to ask.
"""

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
