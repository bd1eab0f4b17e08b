"""A local Ray of two CPUs that serves a model from two replicas, until its standard input ends.

    python ray_server.py MODEL PORT

In a process of its own: Ray's warnings, signals and threads are none of the tests'.
"""

import os
import sys

# What a test needs of Ray: nothing on the network but two addresses of this machine.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")

import ray  # noqa: E402
from ray import serve  # noqa: E402

from mecdeploy.serving.ray_app import app  # noqa: E402

model, port = sys.argv[1:]
ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(app({"models": model, "replicas": "2", "max_delay_ms": "0"}))
    print("serving", flush=True)
    sys.stdin.read()
finally:
    serve.shutdown()
    ray.shutdown()
