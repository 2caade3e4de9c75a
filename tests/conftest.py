"""What holds for every test: the kernels that klab computes with, and examples that may take as long as they take."""

from __future__ import annotations

from contextlib import suppress

from klab.harness.store.kernels import fix_kernels

fix_kernels()

with suppress(ImportError):  # the parity environment has no hypothesis
    from hypothesis import HealthCheck, settings

    settings.register_profile("klab", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("klab")
