"""Small pruned checkpoints, and a clean environment for other processes to load them in."""

import copy
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.int8 import is_pruned
from cap_hf.checkpoints.saving import save_checkpoint
from cap_hf.report import versions


def make_model(seed: int = 0) -> PreTrainedModel:
    """A ViT whose targets are large enough to be worth compressing."""
    transformers.set_seed(seed)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        image_size=8,
        patch_size=4,
        num_channels=3,
        id2label={0: "cat", 1: "dog", 2: "T-shirt/top"},
        label2id={"cat": 0, "dog": 1, "T-shirt/top": 2},
    )
    return ViTForImageClassification(config).eval()


def make_processor() -> object:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": 8, "width": 8})


def make_checkpoint(
    folder: Path, sparsity: float | None = 0.75, compressed: bool = False, facts: dict | None = None, **config: object
) -> PreTrainedModel:
    """Prune by magnitude and save as `cap-hf prune` does; `facts` go into the report over made-up measurements."""
    model = make_model()
    compressor = CAPCompressor(model, CAPConfig(method="magnitude", **config), disable_tqdm=True)
    pruning = compressor.prune(sparsity).to_dict()
    report = {
        "model_name_or_path": "someone/dense-vit",
        "data": {"dataset_name": "someone/pictures", "dataset_config_name": None, "eval_split_name": "test"},
        "seed": 42,
        "versions": versions(),
        "dense": {"top1": 0.75, "loss": 0.5, "num_examples": 8},
        "sparse": {"top1": 0.625, "loss": 0.75, "num_examples": 8},
        "pruning": pruning,
    }
    save_checkpoint(folder, model, compressor.config, report | (facts or {}), make_processor(), compressed)
    return model


def make_int8_checkpoints(folder: Path, sparsity: float = 0.75) -> PreTrainedModel:
    """Save one pruned in blocks of 1x4 as `plain`, and rounded to int8 as `int8`, beside each other."""
    model = make_checkpoint(folder / "plain", sparsity, pattern="1x4")
    compress_checkpoint(folder / "plain", folder / "int8", int8=True)
    return model


@torch.no_grad()
def round_to_int8(model: PreTrainedModel) -> PreTrainedModel:
    """What an int8 checkpoint of a model in float32 stands for, by the definition of its rounding, in NumPy."""
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if type(module) is torch.nn.Linear and is_pruned(module.weight):
            weight = module.weight.numpy().astype(np.float64)
            largest = np.abs(weight).max(axis=1, keepdims=True)
            numbers = np.rint(weight * 127 / np.where(largest > 0, largest, 1)).astype(np.int8)
            module.weight.copy_(torch.from_numpy(numbers.astype(np.float32) * (largest / 127).astype(np.float32)))
    return rounded


def assert_same_weights(loaded: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Bit for bit, every parameter and buffer."""
    found, wanted = loaded.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def clean_environment(home: Path, **variables: str) -> dict[str, str]:
    """For a process with an empty Hugging Face cache that imports this copy of cap_hf."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    root = str(Path(__file__).parents[2])
    return kept | {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([root, str(Path(__file__).parents[1])]),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


PYTHON = sys.executable


OWN_CODE = """
from transformers import ViTConfig, ViTForImageClassification


class OwnConfig(ViTConfig):
    model_type = "own_vit"


class OwnClassifier(ViTForImageClassification):
    config_class = OwnConfig
"""


def make_custom_checkpoint(folder: Path) -> None:
    """Save a pruned checkpoint of an architecture that transformers does not know, with its code beside it."""
    make_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnClassifier"}
    config |= {"model_type": "own_vit", "architectures": ["OwnClassifier"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE)
