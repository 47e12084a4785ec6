"""Fixtures that several rooms use."""

import atexit
import logging
import os
import shutil
import tempfile

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # What torch.compile keeps may be of operators as they were before they were changed.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="cap_hf-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
if not torch.cuda.is_available():
    # Triton's kernels then run on the CPU, by an interpreter. Others than these tests import Triton too, which looks at
    # it once.
    os.environ["TRITON_INTERPRET"] = "1"

import datasets
import pytest
import support.torchvision_operators  # noqa: F401  # before transformers, which imports torchvision where there is one
import transformers
from support.models import TINY_VIT
from transformers import set_seed


@pytest.fixture(autouse=True)
def _leave_as_it_was():
    """What a command or a script sets for its own process is not there for the next test."""
    logger = logging.getLogger("cap_hf")
    level, environment = logger.level, dict(os.environ)
    yield
    logger.setLevel(level)
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()
    for name in {**os.environ}:
        if name.startswith(("ACCELERATE_", "FSDP_")) and name not in environment:
            del os.environ[name]


@pytest.fixture
def tiny_vit():
    """A ViT for 8x8 grey images, the digits' size."""
    set_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TINY_VIT)).eval()


@pytest.fixture
def tiny_checkpoint(tiny_vit, tmp_path):
    """A folder that `from_pretrained` loads: the tiny ViT and its image processor."""
    folder = tmp_path / "dense"
    tiny_vit.save_pretrained(folder)
    transformers.ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    ).save_pretrained(folder)
    return folder
