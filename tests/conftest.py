"""What holds for every test: the kernels that klab computes with, the same examples of a property in every run (other
ones with `HYPOTHESIS_PROFILE=explore`), which may take as long as they take, and a klab that is installed.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from klab.harness.store.kernels import fix_kernels
from tests.support import wheel

fix_kernels()

with suppress(ImportError):  # the parity environment has no hypothesis
    from hypothesis import HealthCheck, settings

    settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("klab", settings.get_profile("explore"), derandomize=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "klab"))


@pytest.fixture(scope="session")
def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """klab's wheel."""
    return wheel.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session", params=["editable", "wheel"])
def installed_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has klab: this one, from the repository, and one that has the wheel."""
    if request.param == "editable":
        return Path(sys.executable)
    return wheel.install(request.getfixturevalue("built_wheel"), tmp_path_factory.mktemp("environment"))
