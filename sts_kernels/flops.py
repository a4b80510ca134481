"""KV cache size and prefill FLOPs of an LLM, by the conventions of the papers. Host numbers only."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MB = 2**20


@dataclass(frozen=True)
class Convention:
    """How FLOPs are counted.

    Attributes:
        factor: FLOPs per multiply-add, 1 or 2.
        matrices: weight matrices per MLP, 2 or 3.
        text: whether the prompt's other tokens count beside the visual tokens.
    """

    factor: int
    matrices: int
    text: bool


# Named after the first source that counts so. STS prints a ratio, where the factor cancels.
CONVENTIONS = {
    "report": Convention(2, 3, True),  # the whole prompt: `Report` of the integration
    "vispruner": Convention(2, 3, False),  # VisPruner Tables 5 to 8, which add the vision encoder
    "sts": Convention(1, 3, False),  # STS Table 3
    "adavtp": Convention(1, 2, True),  # AdaVTP Table 9 and DivPrune's script
}
REPORT = CONVENTIONS["report"]


def _convention(value: Any) -> Convention:
    """`value`, a Convention or the name of one."""
    found = CONVENTIONS.get(value) if isinstance(value, str) else value
    if not isinstance(found, Convention):
        raise ValueError(f"LLMSize: convention must be a Convention or one of {', '.join(CONVENTIONS)}, got {value!r}")
    return found


@dataclass(frozen=True)
class LLMSize:
    """Model sizes that determine KV cache and FLOPs."""

    layers: int
    hidden: int
    query: int  # width of all query heads
    key: int  # width of all key heads
    mlp: float  # width of the MLP that a token takes: of its experts together; mean over layers
    bytes: int  # per element of the KV cache

    @classmethod
    def of(cls, config: Any, dtype: Any) -> "LLMSize":
        """From the transformers configuration of a model, whole or LLM alone, and the torch.dtype of the cache."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            heads * dim,
            kv_heads * dim,
            _mlp_width(config),
            dtype.itemsize,
        )

    def kv_mb(self, token_layers: float) -> float:
        """KV cache of `token_layers` (token, layer) pairs, 2 * key * bytes each, in units of 2**20 bytes."""
        return 2 * self.key * self.bytes * token_layers / MB

    def layer_flops(self, tokens: int, convention: Convention | str = REPORT) -> int:
        """One layer over n = `tokens` tokens: factor * (2 n d (q + k) + 2 n^2 q + matrices * n d m).

        The terms are the projections, attention over the full n x n square, and the MLP. A router of experts does not
        count. With q = k = d: factor * (4 n d^2 + 2 n^2 d + matrices * n d m).
        """
        convention = _convention(convention)
        projections = 2 * tokens * self.hidden * (self.query + self.key)
        attention = 2 * tokens * tokens * self.query
        mlp = round(convention.matrices * tokens * self.hidden * self.mlp)
        return convention.factor * (projections + attention + mlp)

    def prefill_flops(
        self, segments: Iterable[tuple[int, int]], text: int = 0, convention: Convention | str = REPORT
    ) -> int:
        """Prefill FLOPs. segments: (number of layers, visual tokens in each). text: the prompt's other tokens."""
        convention = _convention(convention)
        other = text if convention.text else 0
        return sum(layers * self.layer_flops(visual + other, convention) for layers, visual in segments)


def _mlp_width(config: Any) -> float:
    """Of the configuration of an LLM, dense or with experts in some of its layers."""
    chosen = getattr(config, "num_experts_per_tok", None)
    if not chosen:
        return float(config.intermediate_size)
    dense, step = set(getattr(config, "mlp_only_layers", None) or ()), getattr(config, "decoder_sparse_step", 1)
    layers = range(config.num_hidden_layers)
    sparse = sum(layer not in dense and (layer + 1) % step == 0 for layer in layers)
    width = chosen * config.moe_intermediate_size
    return float((sparse * width + (len(layers) - sparse) * config.intermediate_size) / len(layers))
