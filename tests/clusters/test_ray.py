"""The deployment on a local Ray: the answers of the file itself, also while a replica is killed.

Ray is 200 MB and takes half a minute to start, so that these tests have a tox environment of their own (tox -e ray).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import mecdeploy

pytest.importorskip("ray", reason="needs ray, which has an environment of its own: tox -e ray")

SERVER = Path(__file__).with_name("ray_server.py")
IMAGES = np.random.default_rng(0).integers(0, 256, (16, 1, 8, 8), dtype=np.uint8)
CLIENTS = 4
PATIENCE = 180.0
"""Seconds in which whatever is waited for must have come, on a machine with other work."""


@dataclass(frozen=True)
class Cluster:
    address: str
    process: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    )
    spec = mecdeploy.InputSpec.from_statistics(channels=1, height=8, width=8, mean=128.0, std=60.0)
    quantized = mecdeploy.prepare(network, mecdeploy.QuantConfig(weight_bits=4, act_bits=4), spec)
    mecdeploy.calibrate(quantized, [torch.from_numpy(IMAGES)])
    return mecdeploy.export(quantized, out=tmp_path_factory.mktemp("models") / "three.onnx").path


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("ray") / "log"
    # Replicas import mecdeploy from where this process does.
    environment = {**os.environ, "PYTHONPATH": str(Path(mecdeploy.__file__).parents[1])}
    command = [sys.executable, str(SERVER), str(model), str(port)]
    with log.open("w") as errors:
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    assert server.stdin is not None and server.stdout is not None
    try:
        assert "serving\n" in iter(server.stdout.readline, ""), log.read_text()
        yield Cluster(f"http://127.0.0.1:{port}", server.pid)
    finally:
        server.stdin.close()
        server.stdout.close()
        server.wait(PATIENCE)


def test_the_answers_are_the_files_while_a_replica_is_killed(cluster: Cluster, model: Path) -> None:
    expected = offline(model)
    before = replicas(cluster)
    assert len(before) == 2
    wrong, answered, failed, done = list[int](), Counter[int](), list[str](), threading.Event()

    def keep_asking(number: int) -> None:
        """One image after the other, each until it is answered."""
        with httpx2.Client(base_url=cluster.address, timeout=PATIENCE) as client:
            while not done.is_set():
                row = answered[number] % len(IMAGES)
                response = ask(client, row)
                if response.status_code != 200:
                    failed.append(f"{response.status_code} {response.text}")
                    continue
                if logits_of(response) != expected[row]:
                    wrong.append(row)
                answered[number] += 1

    def all_ask_on(many: int = 20) -> Callable[[], bool]:
        goals = {number: answered[number] + many for number in range(CLIENTS)}
        return lambda: all(answered[number] >= goal for number, goal in goals.items())

    clients = [threading.Thread(target=keep_asking, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        wait_for(all_ask_on())
        assert failed == []
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: len(replicas(cluster) - {killed}) == 2)
        wait_for(all_ask_on())
    finally:
        done.set()
        for client in clients:
            client.join()
    assert wrong == []
    # A client has one request in hand, and only what was in the hands of the killed replica may be refused.
    assert len(failed) <= CLIENTS, failed


def ask(client: httpx2.Client, row: int) -> httpx2.Response:
    """The logits of one image, image and answer as bytes."""
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, *IMAGES.shape[1:]]}
    size = {"parameters": {"binary_data_size": IMAGES[row].nbytes}}
    header = json.dumps({"inputs": [{**tensor, **size}], "parameters": {"binary_data_output": True}}).encode()
    return client.post(
        "/v2/models/three/infer",
        content=header + IMAGES[row].tobytes(),
        headers={"Inference-Header-Content-Length": str(len(header))},
    )


def logits_of(response: httpx2.Response) -> bytes:
    return response.content[int(response.headers["Inference-Header-Content-Length"]) :]


def offline(model: Path) -> list[bytes]:
    """The logits of every image by the file alone."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [session.run(None, {"pixels": image[np.newaxis]})[0].tobytes() for image in IMAGES]


def replicas(cluster: Cluster) -> set[int]:
    """The processes of this Ray's replicas."""
    parents, found = dict[int, int](), set[int]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:default:mecdeploy"):
                found.add(int(folder.name))
        except OSError:
            continue  # it has ended
    return {process for process in found if cluster.process in _ancestors(process, parents)}


def _ancestors(process: int, parents: dict[int, int]) -> Iterator[int]:
    while process in parents:
        process = parents[process]
        yield process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.05)


def test_settings_are_refused_by_name() -> None:
    cases = {
        "models is missing": {},
        "max_bach is no setting of a deployment; did you mean max_batch?": {"models": "a", "max_bach": 3},
        "port is no setting of a deployment": {"models": "a", "port": "80"},
        "replicas is 'two'; it must be a number.": {"models": "a", "replicas": "two"},
        "max_batch is 'many'; it must be a number.": {"models": ["a", "b"], "max_batch": "many"},
        "max_batch is 0": {"models": "a", "max_batch": 0},
    }
    code = f"""
from mecdeploy.errors import UserError
from mecdeploy.serving.ray_app import app
for arguments in {list(cases.values())!r}:
    try:
        app(arguments)
    except UserError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    for said, words in zip(found.stdout.splitlines(), cases, strict=True):
        assert words in said
