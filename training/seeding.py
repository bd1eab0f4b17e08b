"""One way to turn "which run, which epoch, which image" into a random seed."""

from __future__ import annotations

import hashlib
from operator import index


def derive_seed(*parts: int | str) -> int:
    """Hash the parts into a seed for torch.Generator, numpy or random: an int in [0, 2^63).

    The same parts give the same seed in every process and on every platform; parts that differ in number, order, value
    or type (1 is not "1") give an unrelated one. That is what makes a run resumable without storing generator states:
    the seed of epoch 7 is derived, not reached. TypeError without parts or for a part that is neither str nor integer.
    """
    if not parts:
        raise TypeError("derive_seed needs at least one part")
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"s{part}" if isinstance(part, str) else f"i{index(part)}"
        # A file name may hold bytes that are no UTF-8; the length keeps ("ab", "c") apart from ("a", "bc").
        encoded = text.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little") >> 1
