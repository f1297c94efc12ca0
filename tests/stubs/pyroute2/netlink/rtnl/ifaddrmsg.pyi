from pyroute2.netlink import nlmsg

class ifaddrmsg(nlmsg): ...  # noqa: N801
