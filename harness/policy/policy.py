"""What the rest of the harness may ask of a policy."""

from __future__ import annotations

from harness.policy.decoder import Decoder

Policy = Decoder
