"""A configuration of accelerate for several processes on CPUs."""

from __future__ import annotations

import json
from pathlib import Path


def write_configuration(file: Path, kind: str = "MULTI_GPU") -> Path:
    """What `accelerate config` writes for a machine with several devices; YAML, as JSON.

    Args:
        kind: `distributed_type`. With MULTI_GPU it starts as many processes as it is told, on CPUs too.
    """
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": True,
    }
    file.write_text(json.dumps(settings))
    return file
