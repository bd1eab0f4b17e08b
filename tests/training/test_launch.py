"""What the environment says about the processes of a job, and which GPU each of them takes."""

import pytest
import torch

from mecdeploy.training.device import choose_device
from mecdeploy.training.errors import TrainingError
from mecdeploy.training.launch import Launch, launched
from mecdeploy.training.world import joined

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_torchrun_says_which_process_this_is():
    assert launched(TORCHRUN) == Launch(rank=5, size=8, local_rank=1, local_size=4, restarts=2)


def test_a_process_that_nothing_started_is_alone():
    assert launched({}) == Launch()
    assert launched({"RANK": "3"}) == Launch()


def test_a_single_process_of_torchrun_still_knows_that_it_was_restarted():
    one = {name: "0" for name in TORCHRUN} | {"WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert launched(one) == Launch(restarts=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"RANK": None}, "RANK is not set"), ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"), ({"RANK": "x"}, "RANK is 'x'")],
)
def test_an_environment_cut_short_is_refused(change, said):
    environment = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    with pytest.raises(TrainingError) as refusal:
        launched(environment)
    assert str(refusal.value) == (
        f"WORLD_SIZE is '8', but {said}; start the processes with torchrun, or unset WORLD_SIZE."
    )


def test_alone_every_exchange_is_trivial(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as world:
        numbers = torch.tensor([1.0, 2.0])
        assert world.alone and world.main
        assert world.sum(numbers) is numbers
        assert world.gather(numbers).shape == (1, 2)
        assert (world.any(True), world.any(False)) == (True, False)
        assert world.objects("x") == ["x"]
        assert [make(lambda: 3) for make in (world.from_main, world.everywhere, world.local_first)] == [3, 3, 3]
        assert world.tensors_from_main({"a": numbers}) == {"a": numbers}
        network = torch.nn.Linear(2, 1)
        world.same_buffers(network)
        assert torch.equal(world.replicate(network)(numbers), network(numbers))


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_each_process_of_a_machine_takes_a_gpu_of_its_own():
    second = Launch(rank=3, size=4, local_rank=1, local_size=2)
    assert choose_device("auto", second) == torch.device("cuda", 1)
    assert choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu", second) == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_more_processes_than_gpus_are_refused():
    with pytest.raises(TrainingError) as refusal:
        choose_device("auto", Launch(rank=0, size=3, local_size=3))
    assert str(refusal.value) == (
        "torchrun started 3 processes on this machine, but torch sees 2 GPUs; lower --nproc-per-node, or use device "
        "cpu."
    )
