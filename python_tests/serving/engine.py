"""Runs vLLM's engine on the prompts, for each case of a JSON list on standard input; writes one JSON line per case.

A separate process, because an engine leaves global state. A case: family, path of the checkpoint, sts (options of the
plugin, or null), and keyword arguments of vllm.LLM.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run(case: dict) -> dict:
    from vllm import LLM, SamplingParams

    from .prompts import NEW_TOKENS, pictures, prompts

    overrides = {}
    if case.get("sts") is not None:
        architecture = json.loads(Path(case["path"], "config.json").read_text())["architectures"][0]
        overrides = {"hf_overrides": {"architectures": [f"STS{architecture}"], "sts": case["sts"]}}
    options = {"max_model_len": 2048, "max_num_seqs": 8, "enforce_eager": True, "seed": 0, **case.get("options", {})}
    llm = LLM(
        case["path"], dtype="float32", limit_mm_per_prompt={"image": case.get("images", 2)}, **overrides, **options
    )
    encoded: list[list[int]] = []
    if llm.llm_engine.vllm_config.parallel_config.world_size == 1:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        encode = model.embed_multimodal

        def watched(**inputs):
            out = encode(**inputs)
            encoded.append([len(x) for x in out])
            return out

        model.embed_multimodal = watched
    images = pictures(case["family"])
    asked = [
        {"prompt": text, **({"multi_modal_data": {"image": [images[i] for i in which]}} if which else {})}
        for text, which in prompts(case["family"])
    ]
    parameters = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    rounds = [llm.generate(asked, parameters, use_tqdm=False) for _ in range(2)]
    return {
        "answers": [[list(x.outputs[0].token_ids) for x in outs] for outs in rounds],
        "lengths": [len(x.prompt_token_ids) for x in rounds[0]],
        "cached": [x.num_cached_tokens for x in rounds[1]],
        "encoded": encoded,
    }


def main() -> None:
    import gc

    for case in json.load(sys.stdin):
        try:
            result = run(case)
        except Exception as error:
            import traceback

            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        print("RESULT " + json.dumps(result), flush=True)
        from vllm.distributed import cleanup_dist_env_and_memory

        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
