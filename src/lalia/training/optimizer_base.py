"""What our optimizers have in common: a step that can be called off on the device, and state from the beginning."""

from typing import Any

import torch
from torch import Tensor


class Optimizer(torch.optim.Optimizer):
    """PyTorch's, with another `step`. The state of every parameter exists as soon as the optimizer does."""

    def step(self, keep: Tensor | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient.

        Args:
            keep: 0-d, on the parameters' device; where it is 0, nothing changes, whatever the gradients hold. It is
                never read on the host.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # The plain method: its wrapper imports the compiler, which takes about 2 s of every run's start.
        torch.optim.Optimizer.add_param_group.__wrapped__(self, param_group)  # pyright: ignore[reportFunctionMemberAccess]
