"""Learning rate over the run: warm up, hold, decay."""


def learning_rate_scale(
    step: int, num_steps: int, warmup_fraction: float, decay_fraction: float, final_fraction: float
) -> float:
    """Factor on the learning rates at a step (0-based): linear warm-up, constant, linear decay to the final fraction.

    The trapezoid of Zhai et al. 2022; linear decay to zero is the best known end (Bergsma et al. 2025).
    """
    warmup = round(num_steps * warmup_fraction)
    decay = round(num_steps * decay_fraction)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    remaining = num_steps - step
    if remaining < decay:
        return final_fraction + (1.0 - final_fraction) * remaining / decay
    return 1.0
