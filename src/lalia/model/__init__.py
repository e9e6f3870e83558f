"""The one transformer: configuration, layers, attention, cache."""
