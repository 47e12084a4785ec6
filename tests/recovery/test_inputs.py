"""What a trainer is given: models and batches that are what they seem, or one line."""

from functools import partial

import pytest
import torch
from support.recovery import assert_same_zeros, examples, make_trainer, sparse_vit, tiny_vit, zeros
from torch import nn
from torch.utils.data import TensorDataset

from cap_hf import CAPError, SparseTrainer, SparseTrainingArguments


def pairs():
    """The examples as a TensorDataset has them."""
    return TensorDataset(*(torch.stack([each[name] for each in examples()]) for name in ("pixel_values", "labels")))


@pytest.mark.parametrize(
    ("wrap", "said"), [(nn.DataParallel, ""), (partial(torch.compile, backend="eager"), "torch_compile=True in the")]
)
def test_a_wrapped_student_and_teacher_are_what_is_in_them(tmp_path, wrap, said, caplog):
    model = sparse_vit()
    before, weights = zeros(model), model.classifier.weight.detach().clone()
    trainer = make_trainer(tmp_path, wrap(model), teacher=wrap(tiny_vit(1)), max_steps=2)
    trainer.train()
    assert trainer.model is model
    assert_same_zeros(model, before)
    assert not torch.equal(model.classifier.weight, weights)
    assert said in caplog.text
    assert bool(said) == ("torch_compile" in caplog.text)


def test_models_that_cannot_be_trained_are_one_line(tmp_path):
    nn.utils.prune.l1_unstructured((hooked := sparse_vit()).classifier, "weight", 0.5)
    for model, teacher, message in (
        (sparse_vit().half(), None, "the model is in torch.float16, which loses the small steps"),
        (hooked, None, "classifier.weight is made anew before every forward pass"),
        (sparse_vit(), hooked, "classifier.weight is made anew before every forward pass"),
        (nn.Sequential(nn.Linear(2, 2)), None, "Sequential is no model of transformers: load it with AutoModel"),
        (sparse_vit(), nn.Sequential(nn.Linear(2, 2)), "Sequential is no model of transformers"),
        ("some/checkpoint", None, "is no model but of type str"),
        (sparse_vit().requires_grad_(False), None, "every weight of the model is frozen, as a teacher's are"),
        (
            sparse_vit(problem_type="multi_label_classification"),
            tiny_vit(1),
            "is for multi_label_classification: leave",
        ),
    ):
        with pytest.raises(CAPError, match=message):
            make_trainer(tmp_path, model, teacher=teacher)


@pytest.mark.parametrize("taught", [False, True])
def test_pairs_and_numpys_precision_train_as_named_tensors_do(tmp_path, taught):
    arrays = [
        {"pixel_values": each["pixel_values"].double().numpy(), "labels": int(each["labels"])} for each in examples()
    ]
    weights = []
    for data in (examples(), pairs(), arrays):
        model, args = sparse_vit(), SparseTrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, report_to="none")
        trainer = SparseTrainer(model, args, teacher=tiny_vit(1) if taught else None, train_dataset=data)
        trainer.train()
        weights.append(model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_batches_that_are_none_are_one_line(tmp_path):
    def dicts(size, label=1, name="pixel_values", dtype=torch.float32):
        return [{name: torch.zeros(1, size, size, dtype=dtype), "labels": torch.tensor(label)}] * 16

    for data, message in (
        ([("a.png", 1)] * 16, "no batch can be made of examples of type tuple"),
        (dicts(8, name="image"), "a batch has no pixel_values but (image|labels)"),
        (dicts(8, dtype=torch.uint8), "pixel_values are torch.uint8"),
        (dicts(12), r"fails on pixel_values of \(\d+, 1, 12, 12\)"),
        (dicts(8, 99), "fails on .*99 is out of bounds"),
    ):
        for teacher in (None, tiny_vit(1)):
            with pytest.raises(CAPError, match=message) as caught:
                make_trainer(tmp_path, sparse_vit(), data=data, teacher=teacher).train()
            assert "\n" not in str(caught.value)


def test_too_little_memory_reaches_what_looks_for_a_batch_size_that_fits(tmp_path):
    trainer = make_trainer(tmp_path, model := sparse_vit())
    model.register_forward_pre_hook(fail)
    for call in (trainer.compute_loss, partial(trainer.prediction_step, prediction_loss_only=True)):
        with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory. Tried to allocate 2 GiB$"):
            call(model, {name: value[None] for name, value in examples(1)[0].items()})


def fail(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_model_of_many_labels_learns_its_own_loss(tmp_path):
    """BCE, as transformers has it, of labels that are shares."""
    model = tiny_vit(problem_type="multi_label_classification")
    data = [each | {"labels": torch.eye(4)[int(each["labels"])]} for each in examples()]
    trainer = make_trainer(tmp_path, model, data=data, max_steps=1)
    batch = {name: torch.stack([each[name] for each in data[:8]]) for name in data[0]}
    expected = nn.functional.binary_cross_entropy_with_logits(model(batch["pixel_values"]).logits, batch["labels"])
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected)
    trainer.train()
    with pytest.raises(CAPError, match="fails on pixel_values .* must be the same"):
        make_trainer(tmp_path, tiny_vit(problem_type="multi_label_classification"), max_steps=1).train()
