"""The training loop and what it needs: objectives, optimizers, schedules, checkpoints, meters."""
