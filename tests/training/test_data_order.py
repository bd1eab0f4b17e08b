"""Seeds, orders, steps and splits: reproducible anywhere, and nothing moves that should not."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mecdeploy.training.data.order import epoch_order, step_bounds, step_count, stratified_split
from mecdeploy.training.seeding import derive_seed

PARTS = st.lists(st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=5)), min_size=1, max_size=4)


def test_a_seed_is_the_hash_of_its_length_prefixed_parts() -> None:
    message = b"\x02\0\0\0\0\0\0\0i7" + b"\x06\0\0\0\0\0\0\0sorder"
    digest = hashlib.blake2b(message, digest_size=8).digest()
    assert derive_seed(7, "order") == int.from_bytes(digest, "little") // 2


def test_a_seed_is_the_same_in_another_process() -> None:
    program = "from mecdeploy.training.seeding import derive_seed; print(derive_seed(3, 'augment', 12, 0))"
    for hash_seed in ("1", "2"):
        child = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
        )
        assert int(child.stdout) == derive_seed(3, "augment", 12, 0)


@given(one=PARTS, two=PARTS)
def test_different_parts_give_different_seeds_in_range(one: list[int | str], two: list[int | str]) -> None:
    assert 0 <= derive_seed(*one) < 2**63
    assert (derive_seed(*one) == derive_seed(*two)) == (one == two)


def test_parts_cannot_run_together_or_change_type() -> None:
    seeds = [
        derive_seed(*parts) for parts in [("ab", "c"), ("a", "bc"), ("abc",), (1,), ("1",), (1, 1), (11,), (-1,), ("",)]
    ]
    assert len(set(seeds)) == len(seeds)


def test_numpy_integers_and_undecodable_names_are_parts_too() -> None:
    assert derive_seed(np.int64(5), "x") == derive_seed(5, "x")
    assert derive_seed("caf\udce9.jpg") != derive_seed("cafe.jpg")
    with pytest.raises(TypeError):
        derive_seed(1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="at least one part"):
        derive_seed()


def test_an_epochs_order_is_a_permutation_of_its_own() -> None:
    orders = {(seed, epoch): epoch_order(500, seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    for order in orders.values():
        assert torch.equal(order.sort().values, torch.arange(500))
    assert len({tuple(order.tolist()) for order in orders.values()}) == 9
    assert torch.equal(epoch_order(500, 1, 2), orders[1, 2])
    assert torch.equal(epoch_order(5, None, 9), torch.arange(5))


def test_orders_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch_order(10, 3, 4)
    assert torch.equal(before, torch.get_rng_state())


@given(count=st.integers(0, 60), batch_size=st.integers(1, 25), start=st.integers(0, 5), drop_last=st.booleans())
def test_steps_cover_the_images_once(count: int, batch_size: int, start: int, drop_last: bool) -> None:
    whole = [list(range(count))[i : i + batch_size] for i in range(0, count, batch_size)]
    if drop_last and len(whole) > 1 and len(whole[-1]) < batch_size:
        whole.pop()
    assert step_count(count, batch_size, drop_last=drop_last) == len(whole)
    bounds = list(step_bounds(count, batch_size, start_step=start, drop_last=drop_last))
    assert [step for step, _, _ in bounds] == list(range(start, len(whole)))
    assert [list(range(first, end)) for _, first, end in bounds] == whole[start:]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), fraction=st.floats(0.01, 0.99), by_name=st.booleans()
)
def test_a_split_takes_its_share_of_every_class(sizes: list[int], fraction: float, by_name: bool) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    keys: list[int | str] = [f"{i}.jpg" if by_name else i for i in range(len(labels))]
    held_out = round(fraction * len(labels))
    kept, out = stratified_split(labels, keys, held_out)
    assert kept == sorted(kept) and out == sorted(out)
    assert sorted(kept + out) == list(range(len(labels)))
    counts = Counter(labels[i] for i in out)
    for label, size in enumerate(sizes):
        share = held_out * size / len(labels)
        if size == 1:
            assert counts[label] == 0
        else:
            assert 1 <= counts[label] <= size - 1
            # within one image of its share, unless a side would be empty
            assert abs(counts[label] - share) < 1 or counts[label] in (1, size - 1)


def test_shares_add_up_by_largest_remainder() -> None:
    labels = [0] * 15 + [1] * 14 + [2] * 11  # shares of 10: 3.75, 3.5, 2.75
    _, out = stratified_split(labels, range(40), 10)
    assert Counter(labels[i] for i in out) == {0: 4, 1: 3, 2: 3}


def test_a_split_follows_the_keys_and_not_the_order_of_the_images() -> None:
    names = [f"{i:03}.jpg" for i in range(200)]
    labels = [i % 2 for i in range(200)]
    _, out = stratified_split(labels, names, 40)
    backwards = list(range(199, -1, -1))
    _, out_backwards = stratified_split([labels[i] for i in backwards], [names[i] for i in backwards], 40)
    assert {names[i] for i in out} == {names[backwards[i]] for i in out_backwards}


def test_a_new_image_moves_at_most_one_old_one_of_its_class() -> None:
    names = [f"{i:03}.jpg" for i in range(100)]
    _, before = stratified_split([0] * 100, names, 20)
    _, after = stratified_split([0] * 101, [*names, "new.jpg"], 20)
    assert len({names[i] for i in before} - {[*names, "new.jpg"][i] for i in after}) <= 1


def test_the_hash_ranks_the_held_out() -> None:
    keys = ["a", "b", "c", "d", "e"]
    _, out = stratified_split([0] * 5, keys, 2)

    def rank(key: str) -> int:
        parts = (b"sheld out", b"s" + key.encode())
        message = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") // 2

    assert {keys[i] for i in out} == set(sorted(keys, key=rank)[:2])
