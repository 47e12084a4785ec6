"""The image processor of a checkpoint: found, missing, broken."""

import logging

import pytest
from support.checkpoints import make_checkpoint
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from cap_hf.checkpoints.processors import find_image_processor, near_image_processor
from cap_hf.errors import CAPError


def test_a_checkpoint_has_one_or_none_or_a_broken_one(tmp_path, caplog):
    make_checkpoint(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    for found in (find_image_processor(tmp_path), near_image_processor(model)):
        assert isinstance(found, ViTImageProcessorPil)
        assert dict(found.size) == {"height": 8, "width": 8}
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CAPError, match="the image processor of .* cannot be loaded: .*JSON"):
        find_image_processor(tmp_path)
    with caplog.at_level(logging.WARNING, logger="cap_hf"):
        assert near_image_processor(model) is None
    assert "the config says how large images are; image_size says otherwise" in caplog.text
    (tmp_path / "preprocessor_config.json").unlink()
    assert find_image_processor(tmp_path) is None
    assert near_image_processor(model) is None


@pytest.mark.parametrize("name", ["", "someone/nothing", "/nowhere/at/all"])
def test_what_is_not_on_this_machine_is_not_looked_for(name):
    class Model:
        name_or_path = name

    assert near_image_processor(Model()) is None
