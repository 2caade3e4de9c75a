"""What can be known about a grid before it trains: `check` looks in this process, `Preflight` in one of its own."""

from klab.harness.preflight.process import Finding, Preflight

__all__ = ["Finding", "Preflight"]
