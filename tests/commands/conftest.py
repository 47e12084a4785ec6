"""Checkpoints that several commands are tried on."""

import pytest
from support.finetuning import NAMES
from support.recovery import image_processor, sparse_vit, tiny_vit

from cap_hf.config import CAPConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sparse student that was pruned with a config, and a dense teacher."""
    base = tmp_path_factory.mktemp("checkpoints")
    for name, model in (("student", sparse_vit(0.6, **NAMES)), ("teacher", tiny_vit(1, **NAMES))):
        model.save_pretrained(base / name)
        image_processor().save_pretrained(base / name)
    CAPConfig(num_grads=77).save(base / "student")
    return base / "student", base / "teacher"
