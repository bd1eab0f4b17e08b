"""What loading.py runs in a process of its own, as a script: imports nothing but numpy, onnxruntime and the library.

Takes one JSON object on stdin: "model" (path), "threads", and "inputs" (name -> [dtype, shape]). Prints one: bytes of
peak memory after the imports ("baseline"), with the session ready ("loaded") and after one run ("peak"), and seconds
from the path to the session ("seconds").
"""

import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime


def peak_memory() -> int:
    """The most memory that this process has had resident, in bytes.

    Not getrusage, where there is a choice: on Linux its ru_maxrss also holds that of the process that started this one.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Load, run once, say what it took."""
    asked = json.load(sys.stdin)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = asked["threads"]
    options.log_severity_level = 4  # what goes wrong is raised
    baseline = peak_memory()
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(asked["model"], options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    loaded = peak_memory()
    feed = {name: np.empty(shape, dtype) for name, (dtype, shape) in asked["inputs"].items()}
    for array in feed.values():
        array.fill(0)  # np.zeros would take its memory only when it is read
    session.run(None, feed)
    print(json.dumps({"baseline": baseline, "loaded": loaded, "peak": peak_memory(), "seconds": seconds}))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # onnxruntime's errors share no narrower base class
        sys.exit(" ".join(str(error).split()))
