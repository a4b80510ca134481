"""A slow float64 oracle of a pruned model's logits, without a KV cache and without hooks around the layers.

The oracle keeps explicit lists of the tokens that each layer sees, with their original positions. Rotary embedding,
attention, selection and scores are its own code. From the plain model it takes only values that pruning does not
touch: the projector's input and output, the merged prompt and its positions. It finds the token of each feature by
comparing values.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .models import IMAGE, VIDEO, batch

MARGIN = 1e-4  # relative; a decision with a smaller margin raises NearTie


class NearTie(Exception):
    """Two candidates are too close: the model may keep the other one in float32."""


@dataclass
class Expected:
    logits: torch.Tensor  # (steps, V) float64
    kept: list[list[int]]  # columns of the prompt that the LLM's layers see: before the first cut, and after each cut
    dropped: list[int]


def repel(features: torch.Tensor, keep: int, eps: float, first: str = "mean") -> list[int]:
    """Algorithm 1 in float64, one token at a time."""
    x = features.double()
    if first == "mean":
        distance = (x - x.mean(0)).square().sum(1)
        order = distance.sort()
        if len(x) > 1 and order.values[1] - order.values[0] < MARGIN * order.values[0]:
            raise NearTie("anchor")
        picks = [int(order.indices[0])]
    else:
        picks = [0]
    potential = torch.zeros(len(x), dtype=torch.float64)
    while len(picks) < keep:
        potential += 1 / ((x - x[picks[-1]]).square().sum(1) + eps)
        left = potential.clone()
        left[picks] = torch.inf
        order = left.sort()
        if len(x) - len(picks) > 1 and order.values[1] - order.values[0] < MARGIN * order.values[0]:
            raise NearTie(f"pick {len(picks)}")
        picks.append(int(order.indices[0]))
    return picks


def rotary(config, positions: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (3, n): three equal rows for plain rope."""
    rope = getattr(config, "rope_parameters", None) or {}
    old = getattr(config, "rope_scaling", None) or {}
    theta = rope.get("rope_theta") or config.rope_theta
    section = rope.get("mrope_section") or old.get("mrope_section")
    half = dim // 2
    axis = [0] * half
    if section and (rope.get("mrope_interleaved") or old.get("mrope_interleaved")):
        for which in (1, 2):
            for pair in range(which, min(3 * section[which], half), 3):
                axis[pair] = which
    elif section:
        axis = [which for which, count in enumerate(section) for _ in range(count)]
    frequency = torch.tensor([theta ** (-2 * i / dim) for i in range(half)], dtype=torch.float64)
    angle = positions[axis].double().T * frequency
    return torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], 1) * sin


def run_layer(layer, config, hidden: torch.Tensor, positions: torch.Tensor):
    """One decoder layer on exactly these tokens -> its output, the attention of every token (mean over heads), and the
    L1 norm of every token's keys."""
    attention, count = layer.self_attn, len(hidden)
    x = layer.input_layernorm(hidden)
    dim = attention.head_dim
    q, k, v = (p(x).view(count, -1, dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cos, sin = rotary(config, positions, dim)
    group = q.shape[1] // k.shape[1]
    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    outputs, weights, norms = [], [], torch.zeros(count, dtype=torch.float64)
    for head in range(q.shape[1]):
        query, key = rotate(q[:, head], cos, sin), rotate(k[:, head // group], cos, sin)
        weight = (query @ key.T / dim**0.5).masked_fill(future, -torch.inf).softmax(-1)
        outputs.append(weight @ v[:, head // group])
        weights.append(weight)
        if head % group == 0:
            norms += key.abs().sum(1)
    hidden = hidden + attention.o_proj(torch.cat(outputs, 1))
    mlp = layer.mlp(layer.post_attention_layernorm(hidden)[None])
    mlp = mlp[0] if isinstance(mlp, tuple) else mlp  # experts of transformers 4 return their router's logits too
    return hidden + mlp[0], torch.stack(weights).mean(0), norms


class Recording:
    """The plain model's values for one prompt, up to its text model and around it."""

    def __init__(self, model, prompt, steps: int):
        base = model.model
        self.features, self.outputs, self.positions, self.calls = [], [], [], []
        merger = getattr(getattr(base, "visual", None), "merger", None)
        if merger is None:
            first = last = base.multi_modal_projector
        elif hasattr(merger, "mlp"):
            first = last = merger.mlp
        else:
            first, last = merger.linear_fc1, merger.linear_fc2
        hooks = [
            first.register_forward_pre_hook(lambda m, args: self.features.append(args[0].flatten(0, -2))),
            last.register_forward_hook(lambda m, args, out: self.outputs.append(out.flatten(0, -2))),
            base.language_model.register_forward_pre_hook(self._text, with_kwargs=True),
        ]
        try:
            model.generate(**batch(model, [prompt]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
        finally:
            for hook in hooks:
                hook.remove()
        if hasattr(base, "apply_pooling"):
            kinds = [kind for kind in ("image", "video") if prompt.parts[kind]]
            for rows in (self.features, self.outputs):
                rows[:] = [shrunk(base, prompt, kind, x) for kind, x in zip(kinds, rows, strict=True)]
        self.embeds = self.calls[0]["inputs_embeds"][0]
        deep = self.calls[0].get("deepstack_visual_embeds")
        self.deep = None if deep is None else [torch.cat(list(d)) if isinstance(d, list | tuple) else d for d in deep]

    def _text(self, module, args, kwargs):
        count = kwargs["inputs_embeds"].shape[1]
        positions = kwargs["position_ids"]
        positions = positions[-3:] if positions.ndim == 3 else positions[None].expand(3, -1, -1)
        self.positions.append(positions.expand(3, 1, count)[:, 0].cpu())
        self.calls.append({name: kwargs.get(name) for name in ("inputs_embeds", "deepstack_visual_embeds")})


def shrunk(base, prompt, kind: str, rows: torch.Tensor) -> torch.Tensor:
    """LLaVA-OneVision: the projector's rows (n, D) -> what the model interpolates from them, without newlines."""
    rows = rows.unflatten(0, (-1, 36))
    if kind == "video":
        return base.apply_pooling(rows).flatten(0, 1)
    crops = rows.split([len(pixels) for pixels in prompt.images])
    ratio = base.config.vision_aspect_ratio
    parts, _ = base.pack_image_features(crops, torch.tensor(prompt.image_sizes), None, vision_aspect_ratio=ratio)
    return torch.cat(parts)


class Cut(NamedTuple):
    """Pruning inside the LLM before `layer`: `left` visual tokens of the prompt stay."""

    layer: int
    left: int
    score_from: str = "layer"
    raters: bool = False  # True: all text after the last image, equally weighted; False: the prompt's last token
    choose: "Callable[[Inside, int], Chosen] | None" = None  # a method's own rule; None: the largest scores


@dataclass
class Inside:
    """State of the LLM before the layer of a cut. Dictionaries are keyed by the prompt's columns."""

    visual: list[int]  # columns of visual tokens, in the order in which the layers see them
    text: list[int]  # columns after the last image
    first: list[int]  # columns of the visual tokens that entered the LLM
    entered: dict[int, torch.Tensor]  # hidden states at the LLM's input
    hidden: dict[int, torch.Tensor]  # hidden states at the layer's input
    normed: dict[int, torch.Tensor]  # `hidden` after the LLM's final norm
    weights: torch.Tensor  # (queries, keys) attention used as scores
    row: dict[int, int]  # index of each column in `weights`
    norms: dict[int, float]  # L1 norms of the keys


class Chosen(NamedTuple):
    kept: list[int]  # columns of visual tokens that stay
    recycled: list[int]  # columns placed after the last kept token, in this order
    values: dict  # column -> hidden state, where the cut changes it


def repulsion(eps: float = 1e-6, anchor: str = "mean") -> Callable:
    return lambda pool, keep: repel(pool.features, keep, eps, anchor)


@dataclass
class Pool:
    """Candidates of one selection: the tokens of an image, or of a crop of it."""

    features: torch.Tensor  # (N, C) the projector's input
    projected: torch.Tensor  # (N, C) the projector's output
    attention: torch.Tensor | None  # (N,) attention received in the encoder, or relevance to the prompt
    keys: torch.Tensor | None = None  # (N, D) keys of the encoder's attention


def expect(
    model,
    prompt,
    answer: list[int],
    keep: int,
    keep_after: int,
    prune_layer: int,
    eps: float = 1e-6,
    anchor: str = "mean",
    scope: str = "image",
) -> Expected:
    """STS: `keep` tokens of each image, `keep_after` of the prompt."""
    return expect_method(
        model, prompt, answer, keep, repulsion(eps, anchor), [Cut(prune_layer, keep_after)], scope=scope
    )


@torch.no_grad()
def expect_method(
    model,
    prompt,
    answer: list[int],
    keep: int,
    choose: Callable[[Pool, int], list[int] | dict[int, torch.Tensor]],
    cuts: list[Cut],
    scope: str = "image",
    contiguous: bool = False,
    attention: dict[str, torch.Tensor] | None = None,
    keys: dict[str, torch.Tensor] | None = None,
    adaptive: bool = False,
    in_token_order: bool = False,
) -> Expected:
    """The logits that predict answer[0], answer[1], ...

    keep: number of tokens of each image that enter the LLM; with adaptive, `choose` may keep another number.
    choose: (pool, count) -> a list of picks, or a dictionary {pick: its row before the projector}. Such a row is a
    tensor, or the list of tokens whose mean it is.
    attention, keys: by kind, of all features. in_token_order: attention is in the order of the LLM's tokens, where that
    differs from the projector's.
    """
    recording = Recording(model, prompt, max(2, len(answer)))
    ids = torch.tensor(prompt.ids)
    embeds, projector = recording.embeds.cpu().double(), None
    merged = embeds.clone()  # comparisons are with the embeddings of the plain model
    kinds = [kind for kind in ("image", "video") if prompt.parts[kind]]
    tokens, dropped = {}, set()  # tokens: (kind index, unit) -> column
    for kind, features, outputs in zip(kinds, recording.features, recording.outputs, strict=True):
        columns = _columns(ids, kind)
        produced, start = outputs.cpu().double(), 0
        assert len(produced) == sum(map(sum, prompt.parts[kind]))
        for parts in prompt.parts[kind]:
            unit_column = {}
            for unit in range(start, start + sum(parts)):
                match = (embeds[columns] == produced[unit]).all(1).nonzero()[:, 0].tolist()
                assert len(match) <= 1, "features repeat: the prompt is no test"
                if match:
                    unit_column[unit] = columns[match[0]]
            place = {unit: unit for unit in range(start, start + sum(parts))}
            if in_token_order and len(unit_column) == len(place):
                place = {unit: start + i for i, unit in enumerate(sorted(place, key=unit_column.get))}
            groups = []
            for part in parts:
                groups.append([unit for unit in range(start, start + part) if unit in unit_column])
                start += part
            total = min(keep, len(unit_column))
            if scope == "image":
                groups, quota = [[unit for group in groups for unit in group]], [total]
            else:
                quota = _even(total, [len(group) for group in groups])
            for group, count in zip(groups, quota, strict=True):
                scores = None if attention is None else attention[kind][[place[unit] for unit in group]]
                own = None if keys is None else keys[kind][group]
                pool = Pool(features.cpu()[group], produced[group], scores, own)
                picks = choose(pool, count) if count < len(group) else range(len(group))
                kept = {group[i] for i in picks}
                if isinstance(picks, dict):
                    projector = projector or _double_projector(model)
                    x = features.cpu().double()[group]
                    for pick, row in picks.items():
                        row = x[row].mean(0) if isinstance(row, list) else row
                        merged[unit_column[group[pick]]] = projector(row[None])[0]
                assert adaptive or len(kept) == count
                dropped |= {unit_column[u] for u in group if u not in kept}
            tokens.update({(kind, u): c for u, c in unit_column.items()})
    embeds = merged
    text = _double_text(model)
    behind = max(_columns(ids, "image") + _columns(ids, "video"))
    alive = [c for c in range(len(ids)) if c not in dropped]
    positions = torch.cat(recording.positions, dim=1)
    logits, kept = [], None
    for step in range(len(answer)):
        visual = set(tokens.values()) - dropped
        columns = alive + list(range(len(ids), len(ids) + step))
        tail = text["embed"](torch.tensor(answer[:step], dtype=torch.long))
        hidden, kept, weights, norms = torch.cat([embeds[alive], tail]), [alive], None, None
        entered = dict(zip(columns, hidden, strict=True))
        for index, layer in enumerate(text["layers"]):
            for cut in cuts:
                if cut.layer == index and cut.left < len(visual):
                    if cut.score_from == "next":
                        where = _positions(positions, columns, contiguous)
                        _, weights, norms = run_layer(layer, text["config"], hidden, where)
                    asking = [c for c in columns if behind < c < len(ids)] if cut.raters else [len(ids) - 1]
                    if cut.choose is None:
                        score = weights[[columns.index(c) for c in asking]].mean(0)
                        rows = _left(score, columns, visual, cut.left)
                        columns, hidden = [columns[i] for i in rows], hidden[rows]
                    else:
                        inside = Inside(
                            [c for c in columns if c in visual],
                            [c for c in columns if behind < c < len(ids)],
                            sorted(set(tokens.values()) - dropped),
                            entered,
                            dict(zip(columns, hidden, strict=True)),
                            dict(zip(columns, text["norm"](hidden), strict=True)),
                            weights,
                            {c: i for i, c in enumerate(columns)},
                            dict(zip(columns, norms.tolist(), strict=True)),
                        )
                        chosen = cut.choose(inside, cut.left)
                        assert len(chosen.kept) + len(chosen.recycled) == cut.left
                        columns = _placed(columns, visual, chosen)
                        hidden = torch.stack([chosen.values.get(c, inside.hidden[c]) for c in columns])
                    visual &= set(columns)
                    kept.append([c for c in columns if c < len(ids)])
            where = _positions(positions, columns, contiguous)
            hidden, weights, norms = run_layer(layer, text["config"], hidden, where)
            if recording.deep is not None and index < len(recording.deep):
                hidden = _add_deep(hidden, columns, recording.deep[index].cpu().double(), ids)
        kept = kept if len(kept) > 1 else [alive, alive]
        logits.append(text["head"](text["norm"](hidden[-1:]))[0])
    return Expected(torch.stack(logits), kept, sorted(dropped))


def _positions(positions: torch.Tensor, columns: list[int], contiguous: bool) -> torch.Tensor:
    return torch.arange(len(columns)).expand(3, -1) if contiguous else positions[:, columns]


def _placed(columns: list[int], visual: set[int], chosen: Chosen) -> list[int]:
    """Columns in the order in which the layers see them: recycled ones follow the last kept visual token."""
    stay = [c for c in columns if c not in visual or c in chosen.kept]
    last = max(stay.index(c) for c in chosen.kept)
    return stay[: last + 1] + chosen.recycled + stay[last + 1 :]


def _double_projector(model) -> torch.nn.Module:
    merger = getattr(getattr(model.model, "visual", None), "merger", None)
    return copy.deepcopy(model.model.multi_modal_projector if merger is None else merger.mlp).cpu().double()


def _left(weights: torch.Tensor, columns: list[int], visual: set[int], count: int) -> list[int]:
    """Rows that stay: all text, and the `count` visual tokens of largest weight."""
    score = {c: float(weights[i]) for i, c in enumerate(columns) if c in visual}
    ranked = sorted(score, key=lambda c: (-score[c], c))
    if count and score[ranked[count - 1]] - score[ranked[count]] < MARGIN * score[ranked[count]]:
        raise NearTie("scores")
    chosen = set(ranked[:count])
    return [i for i, c in enumerate(columns) if c not in visual or c in chosen]


def _columns(ids: torch.Tensor, kind: str) -> list[int]:
    return (ids == (IMAGE if kind == "image" else VIDEO)).nonzero()[:, 0].tolist()


def _even(total: int, capacities: list[int]) -> list[int]:
    """Quotas: one token at a time to the crop with the smallest quota; ties go to the first crop."""
    parts = [0] * len(capacities)
    for _ in range(total):
        open_parts = [i for i, c in enumerate(capacities) if parts[i] < c]
        parts[min(open_parts, key=lambda i: (parts[i], i))] += 1
    return parts


def _double_text(model) -> dict:
    text = model.model.language_model
    layers = copy.deepcopy(text.layers).cpu().double()
    for module in layers.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "config"):  # experts: fast kernels take no float64
            module.config = copy.copy(module.config)
            module.config._experts_implementation = "eager"
    return {
        "layers": layers,
        "norm": copy.deepcopy(text.norm).cpu().double(),
        "head": copy.deepcopy(model.lm_head).cpu().double(),
        "embed": copy.deepcopy(text.embed_tokens).cpu().double(),
        "config": text.config,
    }


def _add_deep(hidden, columns, features, ids) -> torch.Tensor:
    """Qwen3-VL: adds the deepstack features of the remaining tokens. features: a row per placeholder."""
    places = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0].tolist()
    row = {column: i for i, column in enumerate(places)}
    hidden = hidden.clone()
    for slot, column in enumerate(columns):
        if column in row:
            hidden[slot] += features[row[column]]
    return hidden
