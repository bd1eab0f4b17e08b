"""The coding rate again, in numpy and float64: slogdet, eigenvalues and plain loops, which share no code with ours."""

import math
import zlib

import numpy as np
import torch
from torch import Tensor

from mecdeploy.training.coding import REACH

SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (12, 5), (5, 12), (33, 16), (64, 64)]


def draw(rows: int, columns: int, *, tail: float = 0.0, relu: bool = False, seed: int = 0) -> Tensor:
    """float64 rows, Gaussian or after ReLU, with row energies exp(tail * N(0, 1))."""
    random = np.random.default_rng([seed, rows, columns, zlib.crc32(str((tail, relu)).encode())])
    values = random.standard_normal((rows, columns))
    values = np.maximum(values, 0) if relu else values
    return torch.from_numpy(values * np.exp(tail / 2 * random.standard_normal((rows, 1))))


def slogdet_rate(rows: Tensor, distortion: float) -> float:
    """Ma et al.'s R(Z), on the feature side whatever the shape."""
    values = rows.detach().double().numpy()
    samples, dimension = values.shape
    gram = np.eye(dimension) + dimension / (samples * distortion) * values.T @ values
    sign, logarithm = np.linalg.slogdet(gram)
    assert sign == 1
    return float(logarithm / 2)


def witness_centre(eigenvalues: np.ndarray) -> float:
    mean = eigenvalues.mean()
    bound = mean + ((eigenvalues - mean) ** 4).sum() ** 0.25
    return float(max(mean, (bound - REACH) / (1 + REACH), 0.0))


def witness_series(eigenvalues: np.ndarray, centre: float, order: int) -> float:
    total = 0.0
    for eigenvalue in eigenvalues:
        total += math.log1p(centre)
        for j in range(1, order + 1):
            total += (-1) ** (j + 1) / j * ((eigenvalue - centre) / (1 + centre)) ** j
    return total


def witness_mixture(rows: Tensor, distortion: float, experts: int, order: int | None, center: bool = False) -> float:
    """The mixture as a loop over experts: sort in Python, cut by hand, subtract the mean, numpy for each."""
    values = rows.detach().double().numpy()
    samples, dimension = values.shape
    by_energy = sorted(range(samples), key=lambda row: float((values[row] ** 2).sum()))
    experts = max(1, min(experts, samples // 2 if center else samples))
    larger = samples % experts
    total = 0.0
    for expert in range(experts):
        take = samples // experts + (1 if expert >= experts - larger else 0)
        chosen, by_energy = by_energy[:take], by_energy[take:]
        own = values[chosen] - (values[chosen].mean(axis=0) if center else 0)
        if order is None:
            total += take / samples * slogdet_rate(torch.from_numpy(own), distortion)
            continue
        # All d eigenvalues; the zeros that only a lack of rows explains (m_k, or m_k - 1 about the mean) are not coded.
        eigenvalues = np.linalg.eigvalsh(dimension / (take * distortion) * own.T @ own)
        eigenvalues = eigenvalues[::-1][: min(take - center, dimension)]
        if not len(eigenvalues):
            continue
        total += take / samples * witness_series(eigenvalues, witness_centre(eigenvalues), order) / 2
    assert not by_energy
    return total


def spectra() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {
        "zero": np.zeros(5),
        "flat": np.full(6, 7.0),
        "one": np.array([11.0]),
        "one large": np.array([1e3] + [0.0] * 31),
        "two levels": np.array([40.0] * 4 + [0.1] * 12),
        "log-normal": np.exp(3 * random.standard_normal(32)),
        "huge": np.exp(random.standard_normal(32)) * 1e12,
        "tiny": np.exp(random.standard_normal(32)) * 1e-20,
        "signed": 30 * random.standard_normal(24),
        "negative": -np.exp(2 * random.standard_normal(24)),
    }


def with_spectrum(eigenvalues: np.ndarray) -> Tensor:
    basis, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((len(eigenvalues),) * 2))
    return torch.from_numpy(basis * eigenvalues @ basis.T)
