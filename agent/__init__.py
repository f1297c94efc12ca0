"""idmark: source-address identities for Linux VPN gateways, by fwmark and `ip rule`."""
