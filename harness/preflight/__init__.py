"""What can be known about a grid before it trains: `check` looks in this process, `Preflight` in one of its own."""

from klab.harness.preflight.memory import MemoryEstimate, memory_keys
from klab.harness.preflight.process import Finding, Preflight, Results

__all__ = ["Finding", "MemoryEstimate", "Preflight", "Results", "memory_keys"]
