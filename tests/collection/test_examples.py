"""The same examples, in the same order, however often they are gone through."""

from types import SimpleNamespace

import pytest
import torch
from support.models import build
from torch.utils.data import DataLoader

from cap_hf.collection.examples import CalibrationExamples, first_examples, whole_groups
from cap_hf.config import CAPConfig
from cap_hf.data.images import collate
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.method.losses import FeatureLoss, LabelLoss, SampledLabelLoss


def numbered(count: int) -> list[dict[str, torch.Tensor]]:
    """Examples that can be told apart."""
    return [{"pixel_values": torch.full((1, 2, 2), float(i)), "labels": torch.tensor(i)} for i in range(count)]


def seen(examples: CalibrationExamples) -> list[int]:
    return [int(label) for batch, _, _ in examples for label in batch["labels"]]


@pytest.mark.parametrize("batch_size", [4, 7])
@pytest.mark.parametrize("shuffle", [False, True])
def test_as_many_as_were_asked_for_the_same_each_time(batch_size, shuffle):
    loader = DataLoader(numbered(30), batch_size=batch_size, shuffle=shuffle, collate_fn=collate)
    examples = CalibrationExamples(loader, CAPConfig(num_grads=22), Processes())
    state = torch.get_rng_state()
    first = seen(examples)
    assert len(first) == len(set(first)) == 22
    assert (first == list(range(22))) != shuffle
    assert seen(examples) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert [count for _, count, _ in examples.peek()] == [batch_size]
    assert seen(examples) == first
    examples.limit = 3
    assert seen(examples) == first
    assert max(count for _, count, _ in examples) == 3
    assert examples.size == 30


def test_an_example_has_its_uniform_number_in_whatever_batch_it_lies():
    config = CAPConfig(num_grads=20, fisher_loss="sampled")
    drawn = []
    for batch_size in (4, 7):
        loader = DataLoader(numbered(20), batch_size=batch_size, collate_fn=collate)
        examples = CalibrationExamples(loader, config, Processes())
        examples.use(SampledLabelLoss())
        drawn.append(torch.cat([draws for _, _, draws in examples]))
    assert torch.equal(*drawn)


def test_groups_are_whole():
    loader = DataLoader(numbered(22), batch_size=6, collate_fn=collate)
    examples = CalibrationExamples(loader, CAPConfig(num_grads=9, samples_per_grad=2), Processes())
    assert [count for _, count, _ in examples] == [3, 3, 3]
    wrong = CalibrationExamples(loader, CAPConfig(num_grads=9, samples_per_grad=4), Processes())
    with pytest.raises(CAPError, match="batch size 6 is not a multiple of samples_per_grad=4"):
        list(wrong)


def test_the_first_ones_are_as_many_as_are_wanted_whatever_a_batch_is():
    model = build("ViT")
    config = CAPConfig(num_grads=5, samples_per_grad=5)
    for number in (3, 12, 40):
        loader = DataLoader(numbered(22), batch_size=6, collate_fn=collate)
        batches = first_examples(loader, number, config, Processes(), model)
        assert [start for _, start in batches] == list(range(0, min(number, 22), 6))
        assert [int(label) for batch, _ in batches for label in batch["labels"]] == list(range(min(number, 22)))


def test_a_generator_is_gone_through_once():
    batches = [collate(numbered(4)), collate(numbered(4))]
    examples = CalibrationExamples(iter(batches), CAPConfig(num_grads=8), Processes())
    assert examples.once
    assert examples.size is None
    assert len(list(examples.peek())) == 1
    assert len(seen(examples)) == 8
    assert seen(examples) == []


@pytest.mark.parametrize("once", [False, True])
def test_batches_are_made_from_pairs_and_what_is_none_is_one_line(once):
    def examples(batch):
        return CalibrationExamples(iter([batch]) if once else [batch], CAPConfig(num_grads=2), Processes())

    pair = (torch.zeros(2, 3, 8, 8), [1, 0])
    made = examples(pair)
    made.use(LabelLoss())
    assert torch.equal(made.first()["labels"], torch.tensor([1, 0]))
    assert seen(made) == [1, 0]
    with pytest.raises(CAPError, match="a batch has pixel_values; it needs pixel_values and labels"):
        made = examples(pair[:1])
        made.use(LabelLoss())
        list(made)
    with pytest.raises(CAPError, match="one batch was given in the place of a dataloader"):
        CalibrationExamples({"pixel_values": pair[0]}, CAPConfig(), Processes())


def test_a_batch_size_holds_whole_gradient_samples():
    assert [whole_groups(size, CAPConfig(samples_per_grad=4)) for size in (1, 4, 7, 64)] == [4, 4, 4, 64]
    with pytest.raises(CAPError, match="batch size 0 must be at least 1"):
        whole_groups(0, CAPConfig())


def test_an_example_has_several_projections_each_its_own():
    """Their order keeps the examples of a group apart, and a projection goes with its example in any batch."""
    drawn = []
    for batch_size in (4, 10):
        loader = DataLoader(numbered(10), batch_size=batch_size, collate_fn=collate)
        examples = CalibrationExamples(loader, CAPConfig(num_grads=30), Processes())
        examples.use(FeatureLoss({}, repeats=3))
        pairs = [
            (int(label), int(draw))
            for batch, _, draws in examples
            for label, draw in zip(batch["labels"], draws, strict=True)
        ]
        assert len(set(pairs)) == len({draw for _, draw in pairs}) == 30
        drawn.append(sorted(pairs))
    assert drawn[0] == drawn[1]
    assert [label for label, _ in drawn[0]] == [number for number in range(10) for _ in range(3)]
    with pytest.raises(CAPError, match="num_grads=32 is not a multiple of feature_projections=3"):
        CalibrationExamples(loader, CAPConfig(num_grads=32), Processes()).use(FeatureLoss({}, repeats=3))


@pytest.mark.parametrize("shared", [True, False])
def test_each_of_the_first_examples_has_its_place_among_those_of_all_processes(shared):
    """Batches of a DataLoader are dealt out in turn; what a process has of its own comes after the others'."""
    places = []
    for rank in range(2):
        processes = Processes(SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu")))
        data = DataLoader(numbered(10), batch_size=3, collate_fn=collate) if shared else [collate(numbered(4))]
        for batch, start in first_examples(data, 8, CAPConfig(), processes, build("ViT")):
            assert not shared or batch["labels"][0] == start
            places.append((rank, start, len(batch["labels"])))
    assert places == ([(0, 0, 3), (0, 6, 2), (1, 3, 3)] if shared else [(0, 0, 4), (1, 8, 4)])
