"""Text from a model: decoder, sampler, engine, Python API."""
