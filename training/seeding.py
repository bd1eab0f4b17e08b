"""One way to turn "which run, which epoch, which image" into a random seed."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Hash the parts into a seed for torch.Generator or numpy: an int in [0, 2^63).

    The same parts give the same seed in every process, on every platform; any other parts, in number, order, value or
    type, give an unrelated one. That is what makes a run resumable without storing generator states: the seed of epoch
    7 is derived, not reached. At least one part is needed.
    """
    if not parts:
        raise TypeError("derive_seed needs at least one part")
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1
