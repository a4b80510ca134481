"""LLaVA-1.5."""

from . import base

ADAPTERS = [
    base.ModelAdapter(
        "LLaVA-1.5",
        ("llava",),
        base.multi_modal_projector,
        base.one_item_a_row,
        base.llava_attention,
        base.without_class_token,
        prune_layer=16,
        last_attention=base.llava_last_attention,
        fixed_encoder=base.FixedLlavaEncoder(),
    )
]
