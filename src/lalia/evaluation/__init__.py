"""Evaluation: how good a model is, against honest baselines, and the pages that say so."""
