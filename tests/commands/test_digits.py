"""The demo's models: trained, recovered with their zeros, loaded as they were saved."""

import pytest
import torch
from support.recovery import image_processor, sparse_vit, tiny_vit, zeros
from transformers import AutoImageProcessor, AutoModelForImageClassification

from cap_hf import CAPError
from cap_hf.commands.digits import check_loaded, recover, train_dense
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import ImageDataset, make_dataloader
from cap_hf.data.splits import load_splits


@pytest.fixture(scope="module")
def split():
    return load_splits(DataArguments(max_train_samples=64))["train"]


def test_a_dense_model_is_trained_and_saved(split, tmp_path):
    train_dense(tmp_path / "dense", split, DataArguments(), 1, 0)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    loader = make_dataloader(
        ImageDataset(split, AutoImageProcessor.from_pretrained(tmp_path / "dense"), model.config, DataArguments()), 16
    )
    check_loaded(tmp_path / "dense", model, loader)
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1
    with pytest.raises(CAPError, match="predicts something else after loading"):
        check_loaded(tmp_path / "dense", model, loader)


def test_recovery_learns_and_holds_the_zeros(split, tmp_path):
    names = {"num_labels": 10}
    model, teacher = sparse_vit(0.6, **names), tiny_vit(1, **names)
    before, weight = zeros(model), model.classifier.weight.detach().clone()
    dataset = ImageDataset(split, image_processor(), model.config, DataArguments())
    recover(tmp_path, model, teacher, dataset, 1, 0)
    for name, zero in zeros(model).items():
        assert torch.equal(zero, before[name]), name
    assert not torch.equal(model.classifier.weight, weight)
