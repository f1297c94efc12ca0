"""The lab: a gateway, a corporate network behind a real VPN and the wild Internet, in namespaces on this machine."""

from __future__ import annotations

from agent import IdmarkError


class LabError(IdmarkError):
    """The lab can't be had, or something in it did not come up. The message is one line, for a person."""
