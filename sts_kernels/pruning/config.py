"""STSConfig and STSPlan under the name they had before `sts_kernels.methods`."""

from ..methods._budget import split_evenly
from ..methods.sts import ANCHORS, SCOPES, STSConfig, STSPlan

__all__ = ["ANCHORS", "SCOPES", "STSConfig", "STSPlan", "split_evenly"]
