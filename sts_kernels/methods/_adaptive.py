"""Image complexity (AdaVTP 4.3), and the two numbers derived from it: share of attention tokens, number of tokens."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, analysis
from .base import Method, Pool, option

MEASURES = ("erank", "participation", "entropy")
ERANK_AVG, ERANK_IQR = 95.0, 27.2  # LLaVA-1.5's projected features on MME: mean 94.87, quartiles 81.59 and 108.80
SHARES = (0.1, 0.9)  # min and max share of attention tokens
COUNTS = (0.8, 1.2)  # min and max count, relative to the requested k (App. B.5)


def positive(op: str, name: str, value: Any) -> None:
    _checks.number(op, name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be above 0 and finite, got {value}")


@dataclass(frozen=True)
class Adaptive(Method):
    """A method with parameters that depend on the complexity of the image.

    complexity="erank" is the paper's measure. On CUDA its eigenvalue solver synchronises inside torch; "participation"
    and "entropy" do not synchronise. The default averages are for erank on projected features; `calibrate` measures
    them on other data.
    """

    signals: ClassVar[frozenset[str]] = frozenset({"features", "attention"})

    complexity: str = option("erank", "of an image: erank, participation (ratio) or entropy (of the attention)")
    erank_avg: float = option(ERANK_AVG, "average complexity, of erank on LLaVA-1.5's projected features by default")

    def __post_init__(self) -> None:
        _checks.one_of(self.name, "complexity", self.complexity, MEASURES)
        positive(self.name, "erank_avg", self.erank_avg)
        object.__setattr__(self, "synchronises", self.complexity == "erank")

    def measure(self, pool: Pool, usable: Tensor) -> Tensor:
        """(B,) float32: complexity of each item over its usable tokens. Zero tokens do not change it."""
        if self.complexity == "entropy":
            return analysis.attention_entropy(torch.where(usable, pool.scores, 0).clamp(min=0))
        find = analysis.erank if self.complexity == "erank" else analysis.participation_ratio
        return find(torch.where(usable[..., None], pool.features, 0))

    def calibrate(self, features: Iterable[Tensor] = (), scores: Iterable[Tensor] = ()) -> "Adaptive":
        """Copy of the method with `erank_avg`, and `erank_iqr` if it has that option, measured on a data set.

        Args:
            features: tensors (B, N, C): features at the method's site, B images of N tokens. Used unless
                complexity="entropy".
            scores: tensors (B, N): attention. Used with complexity="entropy".

        Raises:
            ValueError: no image, a non-finite complexity, or no spread to compute `erank_iqr` from.
        """
        name = "scores" if self.complexity == "entropy" else "features"
        found = []
        for given in scores if name == "scores" else features:
            find = {"erank": analysis.erank, "participation": analysis.participation_ratio}
            found.append(find.get(self.complexity, analysis.attention_entropy)(given).cpu())
        values = torch.cat(found).double() if found else torch.empty(0)
        if not len(values) or not values.isfinite().all():
            valid = "finite values of at least 0" if name == "scores" else "finite values"
            what = f"{valid} only" if len(values) else "at least one image"
            raise ValueError(f"{self.name}: calibrate needs {name} of {what}")
        new: dict[str, Any] = {"erank_avg": float(values.mean())}
        if "erank_iqr" in {own.name for own in fields(self)}:
            low, high = values.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
            if low == high:
                raise ValueError(f"{self.name}: calibrate needs {name} of images that differ, for erank_iqr")
            new["erank_iqr"] = high - low
        return replace(self, **new)


@dataclass(frozen=True)
class Mixing(Adaptive):
    """A method that keeps a share r of its tokens by attention and the others by diversity.

    mixing="adaptive": r = clip(centre + 0.5 (erank_avg - e) / erank_iqr, 0.1, 0.9), e the complexity of the image.
    mixing="inverse" has the opposite sign. The paper gives no formula; it says that r falls linearly with the erank.
    """

    erank_iqr: float = option(ERANK_IQR, "third less first quartile of the complexity, for mixing")
    mixing: str = option("fixed", "share of attention tokens: fixed, adaptive (less in a complex image) or inverse")

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self.name, "erank_iqr", self.erank_iqr)
        _checks.one_of(self.name, "mixing", self.mixing, ("fixed", "adaptive", "inverse"))
        object.__setattr__(self, "synchronises", self.synchronises and self.mixing != "fixed")

    def shares(self, centre: float, pool: Pool, usable: Tensor) -> Tensor:
        """(B,) float64: share of attention tokens of each item. Needs mixing="adaptive" or "inverse"."""
        away = (self.erank_avg - self.measure(pool, usable).double()) / self.erank_iqr
        return (centre + (0.5 if self.mixing == "adaptive" else -0.5) * away).clamp(*SHARES)


def counts_of(complexity: Tensor, average: float, k: int) -> Tensor:
    """(B,) int64: round(k clip(e / average, 0.8, 1.2)), at least 1."""
    share = (complexity.double() / average).clamp(*COUNTS)
    return (k * share + 0.5).floor().long().clamp(min=1)


def widest_count(k: int) -> int:
    """Upper bound of `counts_of` for this k."""
    return max(1, int(k * COUNTS[1] + 0.5))
