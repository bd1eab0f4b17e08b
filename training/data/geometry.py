"""Which part of an image is kept, and at what size: integer geometry without pixels."""

from __future__ import annotations

import math
import random

AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10


def covering_size(image_size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) an image is resized to before its centre is cut out: as small as covers the target.

    One side equals the target's; the other keeps the aspect ratio, rounded to the nearest integer, halves up, in exact
    integer arithmetic.
    """
    height, width = image_size
    target_height, target_width = target
    if width * target_height >= height * target_width:  # relatively wider than the target
        return target_height, (2 * width * target_height + height) // (2 * height)
    return (2 * height * target_width + width) // (2 * width), target_width


def random_resized_box(
    image_size: tuple[int, int], target: tuple[int, int], draw: random.Random
) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) in an image of (height, width), to be resized to target (height, width).

    Its area is 8% to 100% of the image's, its aspect ratio 3/4 to 4/3 of the target's (log-uniform); when ten draws do
    not fit into the image, the largest centred box within those ratios.
    Source: Szegedy et al. 2014 (arXiv:1409.4842), sec. 6.
    """
    height, width = image_size
    square = target[1] / target[0]
    for _ in range(TRIES):
        area = height * width * draw.uniform(*AREA)
        ratio = square * math.exp(draw.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = draw.randint(0, width - box_width)
            top = draw.randint(0, height - box_height)
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * square * ASPECT[1])))
    box_height = min(height, max(1, round(width / (square * ASPECT[0]))))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
