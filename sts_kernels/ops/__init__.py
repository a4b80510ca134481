"""One module per op. Adding an op adds two lines here."""

from .attention_received import attention_received
from .last_query_scores import last_query_scores
from .last_query_scores_varlen import last_query_scores_varlen
from .pairwise_sqdist import pairwise_sqdist
from .repulsion_select import repulsion_select
from .repulsion_select_varlen import repulsion_select_varlen
from .repulsion_step import repulsion_step_

__all__ = [
    "attention_received",
    "last_query_scores",
    "last_query_scores_varlen",
    "pairwise_sqdist",
    "repulsion_select",
    "repulsion_select_varlen",
    "repulsion_step_",
]
