"""The model: stacked decoder, sampling, log-probabilities, Hugging Face import and export."""

from klab.harness.policy.policy import Policy

__all__ = ["Policy"]
