"""Policies: language models for many cells at once, their sampling and log-probabilities, and their checkpoints."""
