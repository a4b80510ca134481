"""A stand-in for vLLM: everything that the plugin imports or that its overridden methods call. Runs no model."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch


class Registry:
    """`vllm.ModelRegistry`."""

    def __init__(self):
        self.models = {}

    def register_model(self, architecture: str, path: str) -> None:
        self.models[architecture] = path


class Multimodal:
    """`vllm.multimodal.MULTIMODAL_REGISTRY`."""

    def register_processor(self, processor, *, info, dummy_inputs):
        def decorate(model):
            model._processor_factory = SimpleNamespace(processor=processor, info=info, dummy_inputs=dummy_inputs)
            return model

        return decorate


class Group:
    """A tensor-parallel group of one rank. sent: the tensors that were broadcast."""

    rank_in_group, is_first_rank, world_size = 0, True, 1

    def __init__(self):
        self.sent = []

    def broadcast(self, x, src):
        assert src == 0
        assert x.is_contiguous()
        self.sent.append(x)
        return x

    def all_reduce(self, x):
        return x


class Information:
    def __init__(self, ctx):
        self.ctx = ctx

    def get_hf_config(self):
        return self.ctx.model_config.hf_config

    def get_supported_mm_limits(self):
        return {"image": None, "video": None}


class Processor:
    """A family's multimodal processor in the front end. Returns its inputs."""

    def __init__(self, info, dummy_inputs):
        self.info, self.dummy_inputs = info, dummy_inputs

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        return mm_items

    def _get_mm_hashes(self, inputs):
        return {"image": list(inputs)}


class Model(torch.nn.Module):
    """A model class of vLLM: embed_input_ids returns the multimodal embeddings, forward returns the positions."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        return multimodal_embeddings

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        return positions


def model_class(name: str) -> type:
    vllm_own = SimpleNamespace(processor=Processor, info=Information, dummy_inputs=None)
    return type(name, (Model,), {"_processor_factory": vllm_own})


MODELS = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


@contextmanager
def installed(version: str = "0.32.0"):
    """Installs the stand-in as `vllm` in sys.modules, and drops plugin modules imported before. Yields the module."""
    group = Group()
    vllm = ModuleType("vllm")
    vllm.__version__, vllm.ModelRegistry, vllm.group = version, Registry(), group
    distributed = ModuleType("vllm.distributed")
    distributed.get_tp_group = distributed.get_pp_group = lambda: group
    multimodal = ModuleType("vllm.multimodal")
    multimodal.MULTIMODAL_REGISTRY = Multimodal()
    models = ModuleType("vllm.model_executor.models")
    for name, architecture in MODELS.items():
        setattr(models, name, SimpleNamespace(**{architecture: model_class(architecture)}))
    modules = {
        "vllm": vllm,
        "vllm.distributed": distributed,
        "vllm.multimodal": multimodal,
        "vllm.model_executor": ModuleType("vllm.model_executor"),
        "vllm.model_executor.models": models,
    }
    plugin = "sts_kernels.integrations.vllm"
    before = {name: sys.modules.pop(name, None) for name in (*modules, f"{plugin}.models", f"{plugin}.processor")}
    sys.modules.update(modules)
    try:
        yield vllm
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def configuration(config, **changes) -> SimpleNamespace:
    """A VllmConfig around a transformers configuration; changes: by attribute."""
    multimodal = SimpleNamespace(
        enable_mm_embeds=False,
        mm_encoder_attn_backend=None,
        get_limit_per_prompt=lambda modality: 999,
        mm_encoder_tp_mode="weights",
        is_multimodal_pruning_enabled=lambda: changes.get("video_pruning_rate", 0) > 0,
    )
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=config, multimodal_config=multimodal, max_model_len=2048, enable_prompt_embeds=False
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, use_ubatching=False),
        compilation_config=SimpleNamespace(compile_mm_encoder=False, cudagraph_mm_encoder=False),
        scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=100, max_num_batched_tokens=256),
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
    )
    for part in (multimodal, made.model_config, made.parallel_config, made.compilation_config, made):
        for name, value in changes.items():
            if hasattr(part, name):
                setattr(part, name, value)
    return made
