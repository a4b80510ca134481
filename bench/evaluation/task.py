"""The local lmms-eval task. `python task.py DIR` writes its data and a tiny checkpoint of random weights."""

import sys
from pathlib import Path

QUESTIONS = ["What is in this picture?", "Which colour is it?", "How many cups are there?"]


def pictures_of(doc):
    return [doc["image"].convert("RGB")]


def question_of(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def write(folder: Path) -> None:
    import torch
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Picture

    from sts_kernels.integrations.transformers.random_models import build

    photograph = Picture.open(Path(__file__).parents[2] / "examples/pictures/coffee.jpg").convert("RGB")
    pictures = [photograph.resize((336, 336)), photograph.rotate(90).resize((336, 336)), photograph.resize((400, 200))]
    columns = {"image": pictures, "question": QUESTIONS, "answer": ["x"] * len(pictures)}
    kinds = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(columns, features=kinds).to_parquet(str(folder / "pictures.parquet"))
    torch.manual_seed(0)
    model, processor = build("tiny", "cpu", torch.float32)
    for parameter in model.parameters():  # large enough weights that answers depend on the picture
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder / "tiny")
    processor.save_pretrained(folder / "tiny")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
