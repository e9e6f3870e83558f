"""One small file per architecture: how its config.json and weight names map to ours."""
