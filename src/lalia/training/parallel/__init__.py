"""Training on several devices, applied to the model from outside."""
