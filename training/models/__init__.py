"""The networks a run can name, as plain float modules in training mode.

    build.py        a name -> a network that fits the images and the classes
    small.py        our residual nets for small images (resnet8 ... resnet56)
    zoo.py          every classifier of torchvision, imported on first use
    user_file.py    a module that the user's own file makes
    fitting.py      a network made for other channels or classes, changed where it must be
    probing.py      which images a network can take, found by trying

None of them loads pretrained weights: that is initial.py and published.py of the room.
"""

from mecdeploy.training.models.build import available_models, build_model
from mecdeploy.training.models.small import ResidualBlock, SmallResNet

__all__ = ["ResidualBlock", "SmallResNet", "available_models", "build_model"]
