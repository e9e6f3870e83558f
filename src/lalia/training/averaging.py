"""An exponential moving average of the weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lalia.training.parallel.state import local


class WeightAverage:
    """Keeps average = decay * average + (1 - decay) * weights; early on, decay is (1 + step) / (10 + step) if smaller.

    (Polyak and Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage.)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int, keep: Tensor) -> None:
        """Take in the weights after a step (from 0); `keep` 0 leaves the average as it is."""
        weight = (1.0 - min(self.decay, (1 + step) / (10 + step))) * keep
        for name, average in self.averages.items():
            local(average).lerp_(local(self.parameters[name].detach()), weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights inside the block."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """The model takes the averaged weights, and the average those of the model."""
        for name, average in self.averages.items():
            held = average.clone()
            average.copy_(self.parameters[name])
            self.parameters[name].copy_(held)
