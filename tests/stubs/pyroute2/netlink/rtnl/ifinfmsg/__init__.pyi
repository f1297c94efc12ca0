from pyroute2.netlink import nlmsg

class ifinfmsg(nlmsg): ...  # noqa: N801
