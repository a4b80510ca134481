"""One module per op. Adding an op adds one line here."""

from .pairwise_sqdist import pairwise_sqdist
from .repulsion_select import repulsion_select
from .repulsion_select_varlen import repulsion_select_varlen
from .repulsion_step import repulsion_step_

__all__ = ["pairwise_sqdist", "repulsion_select", "repulsion_select_varlen", "repulsion_step_"]
