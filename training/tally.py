"""What an epoch has summed up so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Sums over the part of the current epoch that is done. seconds: training alone."""

    images: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seconds: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)

    def add(self, images: int, loss: float, correct: float, terms: Mapping[str, float]) -> None:
        """Count one step: means over its images, and how many of them were right."""
        self.images += images
        self.loss += loss * images
        self.correct += correct
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + value * images

    def mean(self, total: float) -> float:
        """A sum as a mean over the images."""
        return total / max(1, self.images)
