"""One module per op. Adding an op adds two lines here."""

from .farthest_select import farthest_select
from .farthest_select_varlen import farthest_select_varlen
from .knn_density import knn_density
from .last_query_scores import last_query_scores
from .last_query_scores_varlen import last_query_scores_varlen
from .nearest import nearest
from .pairwise_sqdist import pairwise_sqdist
from .repulsion_select import repulsion_select
from .repulsion_select_varlen import repulsion_select_varlen
from .repulsion_step import repulsion_step_
from .scatter_mean import scatter_mean
from .suppress_select import suppress_select
from .suppress_select_varlen import suppress_select_varlen

__all__ = [
    "farthest_select",
    "farthest_select_varlen",
    "knn_density",
    "last_query_scores",
    "last_query_scores_varlen",
    "nearest",
    "pairwise_sqdist",
    "repulsion_select",
    "repulsion_select_varlen",
    "repulsion_step_",
    "scatter_mean",
    "suppress_select",
    "suppress_select_varlen",
]
