"""Cache and prefill FLOPs of an LLM, by the conventions that papers count in. Host integers only."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MB = 2**20


@dataclass(frozen=True)
class Convention:
    """How FLOPs are counted.

    Attributes:
        factor: of a multiply-add, 1 or 2.
        matrices: of an MLP, 2 or 3.
        text: whether the prompt's other tokens count beside the visual ones.
    """

    factor: int
    matrices: int
    text: bool


# By the first table here that counts so. STS prints a ratio, which has no factor.
CONVENTIONS = {
    "report": Convention(2, 3, True),  # the whole prompt: `Report` of the integration
    "vispruner": Convention(2, 3, False),  # VisPruner Tables 5 to 8, which add the vision encoder
    "sts": Convention(1, 3, False),  # STS Table 3
    "adavtp": Convention(1, 2, True),  # AdaVTP Table 9 and DivPrune's script
}
REPORT = CONVENTIONS["report"]


@dataclass(frozen=True)
class LLMSize:
    """The sizes that cache and FLOPs depend on."""

    layers: int
    hidden: int
    query: int  # width of all query heads
    key: int  # width of all key heads
    mlp: int
    bytes: int  # of one cached number

    @classmethod
    def of(cls, config: Any, dtype: Any) -> "LLMSize":
        """Of a configuration of transformers and a torch.dtype."""
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            heads * dim,
            kv_heads * dim,
            config.intermediate_size,
            dtype.itemsize,
        )

    def kv_mb(self, token_layers: float) -> float:
        """Cache of so many (token, layer) pairs: 2 * key * bytes each, in units of 2**20 bytes."""
        return 2 * self.key * self.bytes * token_layers / MB

    def layer_flops(self, tokens: int, convention: Convention = REPORT) -> int:
        """One layer over n = `tokens` tokens: 2 n d (q + k) projections, 2 n^2 q attention over the full square, and
        `matrices` n d m of the MLP, times `factor`. With q = k = d: 4 n d^2 + 2 n^2 d + `matrices` n d m."""
        projections = 2 * tokens * self.hidden * (self.query + self.key)
        attention = 2 * tokens * tokens * self.query
        mlp = convention.matrices * tokens * self.hidden * self.mlp
        return convention.factor * (projections + attention + mlp)

    def prefill_flops(self, segments: Iterable[tuple[int, int]], text: int = 0, convention: Convention = REPORT) -> int:
        """Prefill of the layers: `segments` are (layers, visual tokens in them), `text` the prompt's other tokens."""
        other = text if convention.text else 0
        return sum(layers * self.layer_flops(visual + other, convention) for layers, visual in segments)
