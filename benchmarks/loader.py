"""Images a second that each source of data delivers, beside those that a training step takes: nobody should wait.

    python -m benchmarks.loader               some six minutes on two cores, into results/loader.json
    python -m benchmarks.loader --rounds 1    a look, in one minute

Everything takes turns, once a round, on the same machine; a ratio is that within a round. The step is that of full
precision (forward, backward, SGD), which is the fastest there is, and so the hungriest. Whether it waits is measured
in a training loop, too: the share of it that passes before a batch is there. The first batch of an epoch, for which
workers have to start, is told apart.
Photographs are crops of scikit-learn's two, as JPEG files of quality 90 and 500 x 375 pixels, ImageNet's usual size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from torch import Tensor

from benchmarks.environment import describe_environment, load_average, scheduling
from benchmarks.networks import photographs
from benchmarks.timing import quartiles
from mecdeploy.training.config import DataConfig, ModelConfig
from mecdeploy.training.data import Batch, ImageSource, load_dataset
from mecdeploy.training.data.memory import MemorySource
from mecdeploy.training.data.shards_content import read_shard
from mecdeploy.training.models import build_model

RESULT = Path(__file__).parent / "results" / "loader.json"
SMALL, SMALL_BATCH, SMALL_COUNT = 32, 128, 4096
LARGE, LARGE_BATCH, LARGE_COUNT = 224, 16, 512
FILE_SIZE, QUALITY = (375, 500), 90  # height and width in pixels, of JPEG's 100
CLASSES, IN_A_SHARD = 10, 32
WORKERS = (0, 1, 2)
SUPPLY_BATCHES = {SMALL: 40, LARGE: 24}  # delivered in one turn
LOOP_STEPS = {SMALL: 5, LARGE: 3}
INDEXED = 2000  # images in the shard that is indexed

Batches = Callable[[int], Iterator[Batch]]
"""The endless batches of a source from an epoch on."""


def write_images(root: Path, seed: int) -> None:
    """The same JPEG files as a folder of classes and as shards."""
    from sklearn.datasets import load_sample_images

    pictures: list[np.ndarray] = load_sample_images().images  # uint8 [427, 640, 3] each
    draw = np.random.default_rng(seed)
    for part, count in (("train", LARGE_COUNT), ("val", CLASSES)):
        (root / "shards" / part).mkdir(parents=True)
        pattern = str(root / "shards" / part / "%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=IN_A_SHARD, verbose=0) as writer:
            for index in range(count):
                picture = pictures[index % len(pictures)]
                top, left = (int(draw.integers(0, a - b + 1)) for a, b in zip(picture.shape, FILE_SIZE, strict=False))
                crop = picture[top : top + FILE_SIZE[0], left : left + FILE_SIZE[1]]
                path = root / "folder" / part / str(index % CLASSES) / f"{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(crop).save(path, quality=QUALITY)
                writer.write({"__key__": str(index), "jpg": path.read_bytes(), "cls": index % CLASSES})


def endless(source: ImageSource, batch: int, views: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Augmented training batches, epoch after epoch."""
    while True:
        yield from source.batches(batch, seed=seed, epoch=epoch, augment=True, views=views, drop_last=True)
        epoch += 1


def sources(root: Path, seed: int) -> dict[str, tuple[str, int, Batches]]:
    """Name -> the step that it feeds, images in a batch, its batches."""
    pixels = np.tile(photographs(256, seed, SMALL).numpy(), (SMALL_COUNT // 256, 1, 1, 1))
    memory = MemorySource(pixels, np.arange(SMALL_COUNT) % CLASSES, flip=True)
    found: dict[str, tuple[str, int, Batches]] = {
        f"memory, {views} view{'s' * (views > 1)}": (
            step_name("resnet20", views),
            SMALL_BATCH,
            partial(endless, memory, SMALL_BATCH, views, seed),
        )
        for views in (1, 2)
    }
    for kind, prefix in (("folder", "imagefolder:"), ("shards", "shards:")):
        for workers in WORKERS:
            name = f"{prefix}{root / kind}"
            train = load_dataset(DataConfig(name=name, image_size=LARGE, workers=workers), seed=seed).train
            plural = "" if workers == 1 else "s"
            found[f"{kind}, {workers} worker{plural}"] = (
                step_name("resnet18", 1),
                LARGE_BATCH,
                partial(endless, train, LARGE_BATCH, 1, seed),
            )
    return found


def step_name(network: str, views: int) -> str:
    """What a step is called."""
    return f"{network}, {views} view{'s' * (views > 1)}"


def make_step(network: str, side: int) -> Callable[[Batch], None]:
    """A step of full-precision training."""
    model = build_model(ModelConfig(name=network), num_classes=CLASSES, channels=3, height=side, width=side).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(batch: Batch) -> None:
        images: Tensor = torch.cat(batch.images).float() / 255
        loss = F.cross_entropy(model(images), batch.labels.repeat(len(batch.images)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def supply(batches: Batches, epoch: int, count: int, batch: int) -> float:
    """Images a second of `count` batches, once the workers have started and what they made meanwhile is gone."""
    reader = batches(epoch)
    for _ in islice(reader, 2 * max(WORKERS) + 1):
        pass
    start = time.perf_counter()
    for _ in islice(reader, count):
        pass
    seconds = time.perf_counter() - start
    reader.close()  # type: ignore[attr-defined]
    return count * batch / seconds


def appetite(step: Callable[[Batch], None], batch: Batch, count: int) -> float:
    """Images a second of `count` steps on one batch that is there already."""
    start = time.perf_counter()
    for _ in range(count):
        step(batch)
    return count * len(batch.labels) / (time.perf_counter() - start)


def waiting(batches: Batches, epoch: int, step: Callable[[Batch], None], count: int) -> tuple[float, float]:
    """Milliseconds to the first batch, and which share of a training loop passes before a batch is there after it."""
    begun = time.perf_counter()
    reader = batches(epoch)
    batch = next(reader)
    first = (time.perf_counter() - begun) * 1e3
    step(batch)
    waited, start = 0.0, time.perf_counter()
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(reader)
        waited += time.perf_counter() - asked
        step(batch)
    share = waited / (time.perf_counter() - start)
    reader.close()  # type: ignore[attr-defined]
    return first, share


def index_cost(root: Path) -> float:
    """Microseconds of one core an image, to index a shard of empty ones."""
    (root / "index").mkdir()
    with webdataset.ShardWriter(str(root / "index" / "%d.tar"), maxcount=INDEXED, verbose=0) as writer:
        for index in range(INDEXED):
            writer.write({"__key__": f"{index:09}", "jpg": bytes(100_000), "cls": index % CLASSES})
    start = time.process_time()
    read_shard(root / "index" / "0.tar", checked=False)
    return (time.process_time() - start) / INDEXED * 1e6


def measure(rounds: int, seed: int) -> dict[str, Any]:
    """The result, without its environment."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, seed)
        fed = sources(root, seed)
        networks = {"resnet20": make_step("resnet20", SMALL), "resnet18": make_step("resnet18", LARGE)}
        sides = {"resnet20": SMALL, "resnet18": LARGE}
        ready = {name: next(batches(0)) for name, _, batches in fed.values()}
        wanted: dict[str, list[float]] = {name: [] for name in ready}
        given: dict[str, list[float]] = {name: [] for name in fed}
        waits: dict[str, list[tuple[float, float]]] = {name: [] for name in fed}
        indexing = index_cost(root)
        for turn in range(rounds):
            for name, batch in ready.items():
                network = name.split(",")[0]
                networks[network](batch)
                wanted[name].append(appetite(networks[network], batch, LOOP_STEPS[sides[network]]))
            for name, (step, size, batches) in fed.items():
                print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr)
                network = step.split(",")[0]
                given[name].append(supply(batches, turn, SUPPLY_BATCHES[sides[network]], size))
                waits[name].append(waiting(batches, turn, networks[network], LOOP_STEPS[sides[network]]))
    return {
        "rounds": rounds,
        "batch": {"resnet20": SMALL_BATCH, "resnet18": LARGE_BATCH},
        "index_microseconds_per_image": round(indexing, 1),
        "appetite": {name: quartiles(values) for name, values in wanted.items()},
        "sources": {
            name: {
                "step": step,
                "images_per_second": quartiles(given[name]),
                "over_appetite": quartiles([a / b for a, b in zip(given[name], wanted[step], strict=True)]),
                "first_batch_milliseconds": quartiles([first for first, _ in waits[name]]),
                "waiting_share": quartiles([share for _, share in waits[name]]),
            }
            for name, (step, _, _) in fed.items()
        },
    }


def main() -> None:
    """Write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a step; all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    environment = describe_environment(seed=arguments.seed, threads=arguments.threads) | {"scheduling": scheduling()}
    environment["load_average_before"] = load_average()
    result = {"environment": environment, **measure(arguments.rounds, arguments.seed)}
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
