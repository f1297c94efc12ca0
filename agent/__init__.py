"""idmark: source-address identities for Linux VPN gateways, by fwmark and `ip rule`."""


class IdmarkError(Exception):
    """Trouble that is told to the user: the message says what was being done, and what went wrong."""

    def lines(self) -> list[str]:
        """The message as it is printed."""
        return f"idmark: {self}".splitlines()
