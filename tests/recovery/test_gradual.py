"""What prunes in a gradual run, and whether it fits the schedule."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from support.recovery import examples, image_processor, make_trainer, sparse_vit, tiny_vit
from transformers import TrainingArguments

from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.data.images import make_dataloader
from cap_hf.errors import CAPError
from cap_hf.recovery.gradual import GradualPruner
from cap_hf.recovery.schedules import SparsitySchedule
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.targets import find_targets


def test_a_schedule_needs_something_that_prunes(tmp_path):
    args = SparseTrainingArguments(output_dir=str(tmp_path), sparsity_schedule="0.5", use_cpu=True)
    with pytest.raises(CAPError, match="prune=GradualPruner"):
        SparseTrainer(tiny_vit(), args, train_dataset=examples())
    with pytest.raises(CAPError, match="SparseTrainingArguments"):
        SparseTrainer(tiny_vit(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def pruner(**changes):
    return GradualPruner(make_dataloader(examples(), 16), CAPConfig(num_grads=32, **changes), disable_tqdm=True)


def test_a_step_prunes_in_place_to_the_weight():
    model = sparse_vit(0.3)
    before = {target.name: target.weight == 0 for target in find_targets(model)}
    report = pruner()(model, 0.7, Accelerator())
    assert report.num_zeros == round(0.7 * report.num_weights)
    for target in find_targets(model):
        assert not target.weight[before[target.name]].any()


def test_a_sparsity_is_a_share_of_the_weights_that_are_pruned():
    """A model whose zeros all lie in layers that are left out may be pruned from nothing."""
    model = sparse_vit(0.8)
    with torch.no_grad():
        for target in find_targets(model, include=["*.fc1"]):
            target.weight.fill_(1.0)
    schedule = SparsitySchedule.parse("0.1")
    with pytest.raises(CAPError, match=r"starts at sparsity 0\.1, but the model is"):
        pruner().check(model, schedule)
    pruner(include=["*.fc1"]).check(model, schedule)
    with pytest.raises(CAPError, match=r"but the model is 80\.\d+% sparse already"):
        pruner(exclude=["*.fc1"]).check(model, schedule)


@pytest.mark.parametrize(("allocation", "text"), [("2:4", "0.5"), ("1:2", "0.4999999999"), ("7:8", "0.125")])
def test_a_pattern_goes_with_its_own_sparsity(allocation, text):
    pruner(allocation=allocation).check(tiny_vit(), SparsitySchedule.parse(text))


def test_the_advice_for_a_pattern_can_be_followed():
    """Also where the sparsity has no end in decimal digits."""
    model = tiny_vit(hidden_size=24, intermediate_size=48)
    with pytest.raises(CAPError, match=r"--allocation 1:3 goes with --sparsity_schedule 0\.6666666667 alone") as caught:
        pruner(allocation="1:3").check(model, SparsitySchedule.parse("0.7"))
    advised = str(caught.value).split("--sparsity_schedule ")[1].split()[0]
    pruner(allocation="1:3").check(model, SparsitySchedule.parse(advised))


@pytest.mark.parametrize("text", ["0.3,0.5,2,linear", "0.5,0.9,2,linear", "0.6", "0:0.5,1:0.75"])
def test_a_pattern_goes_with_no_other_sparsity(tmp_path, text):
    with pytest.raises(
        CAPError, match="goes with --sparsity_schedule 0.5 alone: sparsity .* contradicts 2:4"
    ) as caught:
        make_trainer(tmp_path, tiny_vit(), sparsity_schedule=text, allocation="2:4", max_steps=-1)
    assert "\n" not in str(caught.value)


def test_a_pattern_that_does_not_divide_is_said_before_training(tmp_path):
    with pytest.raises(CAPError, match="5:7 does not divide the 16 input channels"):
        make_trainer(tmp_path, tiny_vit(), sparsity_schedule="0.2857142857", allocation="5:7")


def test_the_seed_fixes_the_calibration_set():
    pixels = np.arange(20 * 64, dtype=np.uint8).reshape(20, 8, 8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("abcd")))
    split = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(each) for each in pixels], "label": [i % 4 for i in range(20)]}, features=features
    )

    def batches(seed, **changes):
        config = CAPConfig(num_grads=4, seed=seed, **changes)
        made = GradualPruner.from_split(split, image_processor(), tiny_vit(), DataArguments(), config, batch_size=5)
        return [batch["pixel_values"] for batch in made.dataloader]

    first, again, other = batches(0), batches(0), batches(1)
    assert [len(batch) for batch in first] == [4]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    # Examples of one gradient sample stay together, in as few as it takes.
    assert [len(batch) for batch in batches(0, samples_per_grad=2)] == [4, 4]
    assert [len(batch) for batch in batches(0, samples_per_grad=3)] == [3, 3, 3, 3]
