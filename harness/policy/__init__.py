"""The model: stacked decoder, sampling, log-probabilities, Hugging Face import and export."""

from harness.policy.policy import Policy

__all__ = ["Policy"]
