"""Policies: language models for many cells at once, their sampling and log-probabilities, and their checkpoints."""

from klab.harness.policy.policy import Policy

__all__ = ["Policy"]
