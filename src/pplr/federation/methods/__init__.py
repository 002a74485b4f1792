"""The federated methods, one file each: what a client minimises, and who learns from whom.

A new method is a file that registers a subclass of :class:`Method`, and an import here.
"""

from pplr.federation.methods.base import METHODS, Method, Mixing, RoundView, make_method, register
from pplr.federation.methods.centralized import Centralized
from pplr.federation.methods.ditto import Ditto
from pplr.federation.methods.fedavg import FedAvg
from pplr.federation.methods.fedprox import FedProx
from pplr.federation.methods.local import Local
from pplr.federation.methods.pplr import PPLR
from pplr.federation.methods.pplr_weighted import WeightedPPLR

__all__ = [
    "METHODS",
    "PPLR",
    "Centralized",
    "Ditto",
    "FedAvg",
    "FedProx",
    "Local",
    "Method",
    "Mixing",
    "RoundView",
    "WeightedPPLR",
    "make_method",
    "register",
]
