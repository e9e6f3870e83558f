"""Judges every step on the device, before the optimizers see it: finite, and no spike."""

import torch
from torch import Tensor

WINDOW = 128
"""Applied steps that a new one is compared with."""


class StepGuard:
    """Decides whether a step is applied, from its loss and gradient norm, without waiting for the device.

    A step is skipped if either is not finite, or if one lies more than `deviations` standard deviations above its
    mean over the last `WINDOW` applied steps (half of them must have been seen). The rule is OLMo-core's skip-step
    optimizer's (its documentation, 2024); skipped steps do not enter the history.

    Args:
        deviations: 0 skips only what is not finite.
        device: where loss and norm are.
    """

    def __init__(self, deviations: float, device: torch.device) -> None:
        self.deviations = deviations
        self.history = torch.zeros(2, WINDOW, device=device)
        """Loss and gradient norm of applied steps, a ring."""
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Steps in the history so far, steps skipped in all, steps skipped in a row."""
        self._places = torch.arange(WINDOW, device=device)

    def judge(self, loss: Tensor, norm: Tensor, present: Tensor) -> Tensor:
        """1.0 to apply the step, 0.0 to skip it (a 0-d float32 tensor); all arguments are 0-d.

        `present` says whether the batch had anything to predict; one that had not changes nothing.
        """
        values = torch.stack((loss, norm)).float()
        keep = values.isfinite().all()
        if self.deviations:
            seen = self.counts[0].clamp(max=WINDOW)
            mask = self._places < seen
            mean = (self.history * mask).sum(1) / seen.clamp(min=1)
            spread = (((self.history - mean[:, None]) * mask).square().sum(1) / seen.clamp(min=1)).sqrt()
            usual = (values <= mean + self.deviations * spread + 1e-3 * mean.abs()).all()
            keep = keep & (usual | (seen < WINDOW // 2))
        here = (self._places == self.counts[0] % WINDOW) & keep & present
        self.history.copy_(torch.where(here, values[:, None], self.history))
        kept = keep.to(torch.int64)
        self.counts[0] += kept * present
        self.counts[1] += 1 - kept
        self.counts[2].copy_(torch.where(present, (self.counts[2] + 1) * (1 - kept), self.counts[2]))
        return keep.float()

    def forget(self) -> None:
        """Begin a new history, and a new row of skipped steps."""
        self.history.zero_()
        self.counts[0].zero_()
        self.counts[2].zero_()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"guard.history": self.history, "guard.counts": self.counts}
