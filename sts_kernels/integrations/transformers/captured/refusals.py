"""What graphs do not serve: methods and models (`check`), a model as it is set up (`standing_reason`), a model that was
changed (`Compiled`), a generate() (`check_call`, `check_arguments`)."""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .... import _checks
from ....methods import Method
from .. import compat
from ..adapters import ModelAdapter
from ..hooks import Hook
from ..untyped import Args, Config, Kwargs, Model

if TYPE_CHECKING:
    from ..handle import PruningHandle

BACKENDS = (None, "inductor", "eager")  # "eager": torch.compile's tracing alone, for tests
ATTENTIONS = ("sdpa", "eager")
LIBRARY_LENGTH = 20  # new tokens that generate() makes by default
# LLMs whose forward is exactly token embeddings, rotary embeddings, layers and a norm.
LLMS = (
    "LlamaModel",
    "MistralModel",
    "Qwen2Model",
    "Qwen3Model",
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
    "Qwen3VLTextModel",
    "Qwen3VLMoeTextModel",
)
# Options of generate() that graphs do not serve, with the values besides None that turn them off.
UNSERVED = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "use_cache": (True,),
    "cache_implementation": ("dynamic",),
    "prefill_chunk_size": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "guidance_scale": (1,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "token_healing": (False,),
    "assistant_model": (),
    "custom_generate": (),
    "inputs_embeds": (),
    "position_ids": (),
    "mm_encoder_outputs": (),
    "pixel_values_videos": (),
    "labels": (),
    "logits_to_keep": (1,),
    "negative_prompt_ids": (),
    **dict.fromkeys(compat.CACHE_NAMES, ()),
}
PIXELS = ("pixel_values", "pixel_values_images")
# Arguments of the model, or of its encoder, that graphs serve.
SERVED = {
    *PIXELS,
    *compat.CACHE_NAMES,
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "mm_token_type_ids",
    "image_sizes",
    "image_grid_thw",
    "batch_num_images",
    "logits_to_keep",
    "use_cache",
    "return_dict",
}


class Refused(Exception):
    """Graphs cannot serve a call; the message is the reason."""


# --- compile() ---


def check(method: Method, adapter: ModelAdapter, text: Model) -> None:
    """Raises NotImplementedError for methods and models of which graphs can serve no call."""
    if (reason := unselectable(method, text.embed_tokens.weight.device)) is not None:
        raise NotImplementedError(f"compile: {method.name} cannot be compiled: {reason}")
    if adapter.fixed_encoder is None:
        raise NotImplementedError(f"compile: the vision encoder of {adapter.name} cannot be compiled")
    attention = text.config._attn_implementation or "eager"
    if attention not in ATTENTIONS:
        raise NotImplementedError(
            f"compile: attention {attention!r} cannot be compiled, only {' and '.join(ATTENTIONS)} can; load the model "
            'with attn_implementation="sdpa"'
        )
    if type(text).__name__ not in LLMS:
        raise NotImplementedError(
            f"compile: an LLM of class {type(text).__name__} cannot be compiled, only {', '.join(LLMS)} can"
        )

    experts = getattr(text.config, "num_experts_per_tok", None)
    if experts and getattr(text.config, "_experts_implementation", None) == "eager":  # None: transformers 4
        raise NotImplementedError(
            "compile: experts that the host calls one by one cannot be compiled; load the model with "
            'experts_implementation="grouped_mm"'
        )


def unselectable(method: Method, device: torch.device) -> str | None:
    """Why the method cannot select inside a graph; None: it can."""
    if method.adaptive:
        return "how many tokens it keeps follows from the tokens, and a graph has fixed shapes"
    if method.signals & {"text", "relevance"}:
        return "it looks at the text of the prompt, or at numbers of the caller's, while the image is encoded"
    if method.synchronises and device.type == "cuda":
        return 'its complexity="erank" waits for the device; give complexity="participation" or "entropy"'
    return None


def sizes(name: str, value: int | Sequence[int], least: int) -> tuple[int, ...]:
    """`value`, one int or several, ascending and without duplicates. Each must be at least `least`."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for number in values:
        _checks.integer("compile", name, number, least)
    if not values:
        raise ValueError(f"compile: {name} must have at least one number, got none")
    return tuple(sorted(set(values)))


def check_backend(backend: str | None) -> None:
    if backend not in BACKENDS:
        raise ValueError(f'compile: backend must be None or "inductor", got {backend!r}')


def standing_reason(
    handle: "PruningHandle", head: torch.nn.Module | None, modules: list[torch.nn.Module]
) -> str | None:
    """Why graphs can serve no call of this model; None: they can."""
    if head is None:
        return "the model has no output embeddings"
    if any(hasattr(module, "_hf_hook") for module in modules):
        return "modules of the model are offloaded, or placed by accelerate's hooks"
    if any(getattr(module, "hf_quantizer", None) is not None for module in modules):
        return "the model is quantised"
    devices = sorted({str(parameter.device) for parameter in handle.model.parameters()})
    if len(devices) > 1:
        return f"the model is on several devices, {', '.join(devices)}"
    kind = getattr(handle.text.rotary_emb, "rope_type", "default")
    if "dynamic" in kind or kind == "longrope":
        return f"rotary embeddings of type {kind} follow the length of the prompt"
    return None


class Compiled:
    """What graphs keep of a model: its modules, the addresses of its weights, and what its configuration says.

    `check` runs before every generate(), so all lists that it walks are made here.
    """

    def __init__(self, config: Config, modules: list[torch.nn.Module]):
        self._config, self._settings = config, copy.deepcopy(_settings(config))
        tables = [(module._modules, module._parameters, module._buffers) for module in modules]
        self._tables = [table for three in tables for table in three if table]
        self._parts = self._parts_now()  # kept alive: a new object must not get the id of one of these
        self._ids = list(map(id, self._parts))
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def _parts_now(self) -> list[object]:
        return [part for table in self._tables for part in table.values()]

    def check(self) -> None:
        """Raises Refused if weights, modules or the configuration are no longer those that were compiled."""
        settings = _settings(self._config)
        if settings != self._settings:
            names = settings.keys() | self._settings.keys()
            changed = sorted(name for name in names if settings.get(name) != self._settings.get(name))
            raise Refused(f"{', '.join(changed)} of the model's configuration has changed; call compile() again")
        same = list(map(id, self._parts_now())) == self._ids
        if not same or [tensor.data_ptr() for tensor in self._tensors] != self._addresses:
            raise Refused("weights or modules of the model were replaced; call compile() again")


def _settings(config: Config, path: str = "") -> dict[str, Any]:
    """All attributes, private ones too, with those of the configurations inside as `text_config.hidden_size`."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        found |= _settings(value, f"{path}{name}.") if hasattr(value, "to_dict") else {path + name: value}
    return found


# --- generate() ---


def check_call(
    module: Model,
    args: Args,
    kwargs: Kwargs,
    base: Model,
    modules: list[torch.nn.Module],
    device: torch.device,
    new: int,
) -> None:
    """Raises Refused for a generate() of `module` that graphs do not serve.

    base, modules: the base model, and all parts of the pruned model. device: of the graphs. new: max new tokens.

    Raises:
        ValueError: the call asks for more new tokens.
    """
    given = (kwargs.get("generation_config"), module.generation_config)

    def option(name: str) -> Any:
        values = [kwargs[name]] if kwargs.get(name) is not None else [getattr(g, name, None) for g in given]
        return next((value for value in values if value is not None), None)

    if len(args) > 1:
        raise Refused("arguments of generate() by position")
    for name, plain in UNSERVED.items():
        value = option(name)
        if not any(value is allowed or value == allowed for allowed in (None, *plain)):
            raise Refused(f"{name} of generate()")
    if base.training:
        raise Refused("the model is in training mode")
    if torch.is_autocast_enabled(device.type):
        raise Refused("autocast is on")
    if (hooked := _foreign_hooks(modules)) is not None:
        raise Refused(f"there are hooks on {hooked}, which a graph would not call")
    for part in (module, base, base.language_model):
        if _has_own_forward(part):
            raise Refused(f"{type(part).__name__} has a forward of its own, which a graph would not call")
    _check_length(args[0] if args else kwargs.get("input_ids", kwargs.get("inputs")), option, new)


def check_arguments(arguments: Kwargs, config: Config) -> None:
    """Raises Refused for arguments of the model that graphs would ignore. A value that equals the configuration's, None
    and False change nothing."""
    for name, value in arguments.items():
        if name in SERVED or value is None or value is False:
            continue
        if isinstance(value, Tensor) or value != getattr(config, name, None):
            raise Refused(f"the argument {name} of the model")


def _check_length(ids: Any, option: Callable[[str], Any], new: int) -> None:
    asked, longest = option("max_new_tokens"), option("max_length")
    if asked is None and longest not in (None, LIBRARY_LENGTH) and isinstance(ids, Tensor):
        asked = longest - ids.shape[-1]
    asked = LIBRARY_LENGTH if asked is None else asked
    if asked > new:
        raise ValueError(
            f"sts_kernels: max_new_tokens is {asked}, and the most compiled for is {new}; give "
            f"compile(max_new_tokens={asked})"
        )


def _foreign_hooks(modules: list[torch.nn.Module]) -> str | None:
    """Class of a module with hooks that are neither this package's nor the library's."""
    for module in modules:
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for hook in table.values():
                if not _is_library(hook) and not isinstance(hook, Hook):
                    return type(module).__name__
    return None


def _has_own_forward(module: Model) -> bool:
    """Whether its forward is neither the library's nor one that torch.compile made of it."""
    forward = vars(module).get("forward", type(module).forward)
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return not _is_library(forward)


def _is_library(function: object) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("transformers.")
