"""A whole machine: systemd as process 1, with the units of deploy/ as an operator installs them."""
