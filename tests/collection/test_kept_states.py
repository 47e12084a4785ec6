"""A pass through some layers alone sums what one through the whole model does, bit for bit."""

import pytest
import torch
from support.models import ARCHITECTURES, build, random_batches

from cap_hf.collection.chains import find_chains
from cap_hf.collection.gradient_sums import GradientSums
from cap_hf.collection.input_sums import InputSums
from cap_hf.collection.kept_states import Alone, KeptStates, WholeModel, compact
from cap_hf.collection.passes import fill
from cap_hf.collection.running import frozen
from cap_hf.collection.stretches import stretch_of
from cap_hf.method.losses import LabelLoss
from cap_hf.targets import find_targets


def groups_of(targets) -> list:
    """Three groups: the second begins within a layer, and ends within one."""
    third = len(targets) // 3
    return [targets[: third + 1], targets[third + 1 : 2 * third + 1], targets[2 * third + 1 :]]


def strips(statistic, target) -> list[torch.Tensor]:
    return statistic.strips(target) + statistic.moments[target.name].strips


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("recorded", "stride"), [(0, 1), (2, 1), (1, 2)])
def test_groups_alone_equal_the_whole_model(name, recorded, stride):
    """Whatever group's pass the states were kept in, and with several microbatches a step."""
    model, side = build(name), ARCHITECTURES[name][1]
    batches = [(batch, 4, None) for batch in random_batches(model, side, sizes=(4, 4))]
    targets, loss = find_targets(model), LabelLoss()
    groups = groups_of(targets)

    def filled(targets, through, items):
        statistic = GradientSums(targets, microbatch=3, through=through, inputs=InputSums(targets))
        fill(statistic, model, items)
        return statistic

    with frozen(model):
        expected = filled(targets, WholeModel(loss), batches)
        chains = find_chains(model, batches[0][0], loss, None, targets, 4)
        found = {number: stretch_of(chains, group, stride) for number, group in enumerate(groups)}
        states = KeptStates({number: each for number, each in found.items() if each is not None}, loss)
        with states.keeping():
            first = filled(groups[recorded], states, batches)
        assert states.is_whole
        for target in groups[recorded]:
            assert all(map(torch.equal, strips(first, target), strips(expected, target)))
        assert states.stretches or name in ("Swin", "ConvNext")
        # Twice: what is kept stays as it is.
        for _ in range(2):
            for number, stretch in states.stretches.items():
                alone = filled(groups[number], Alone(stretch), states.items())
                assert alone.count == expected.count
                for target in groups[number]:
                    assert all(map(torch.equal, strips(alone, target), strips(expected, target))), target.name


def test_other_layers_are_not_called():
    model = build("ViT", num_hidden_layers=3)
    targets, loss = find_targets(model), LabelLoss()
    (batch,) = random_batches(model, 8, sizes=(4,))
    with frozen(model):
        (chain,) = find_chains(model, batch, loss, None, targets, 4)
        group = [target for target in targets if ".1." in target.name]
        states = KeptStates({1: stretch_of([chain], group)}, loss)
        with states.keeping():
            fill(GradientSums(targets, through=states), model, [(batch, 4, None)])
        called = []
        for number, layer in enumerate(model.vit.layers):
            layer.register_forward_hook(lambda *_, number=number: called.append(number))
        model.vit.embeddings.register_forward_hook(lambda *_: called.append("embeddings"))
        fill(GradientSums(group, through=Alone(states.stretches[1])), model, states.items())
    assert called == [1]


def test_hidden_states_are_kept_where_stretches_begin_and_nowhere_else():
    model = build("ViT", num_hidden_layers=3)
    targets, loss = find_targets(model), LabelLoss()
    (batch,) = random_batches(model, 8, sizes=(4,))
    with frozen(model):
        chains = find_chains(model, batch, loss, None, targets, 4)
        groups = [
            [each for each in targets if ".0." in each.name],
            [each for each in targets if ".0." not in each.name],
        ]
        states = KeptStates({number: stretch_of(chains, group) for number, group in enumerate(groups)}, loss)
        with states.keeping():
            fill(GradientSums(targets, through=states), model, [(batch, 4, None)])
    ((samples, step),) = states.steps
    assert samples == 4
    assert sorted(number for _, number in step[0].calls) == [0, 1, 2]
    assert [step[0].calls[id(chains[0]), number].hidden.numel() for number in (0, 1, 2)] == [4 * 5 * 16, 4 * 5 * 16, 0]
    assert sorted(number for _, number in step[0].grads) == [1, 3]
    states.clear()
    assert states.steps == []
    assert not states.is_whole


def test_a_pass_that_fails_keeps_nothing():
    model = build("ViT")
    targets, loss = find_targets(model), LabelLoss()
    batches = random_batches(model, 8, sizes=(4, 4))

    def broken():
        yield batches[0], 4, None
        raise KeyboardInterrupt

    with frozen(model):
        chains = find_chains(model, batches[0], loss, None, targets, 4)
        states = KeptStates({0: stretch_of(chains, targets)}, loss)
        with pytest.raises(KeyboardInterrupt), states.keeping():
            fill(GradientSums(targets, through=states), model, broken())
        assert states.steps == []
        assert not states.is_whole
        assert not model.vit.layers[0]._forward_hooks
        assert not model.vit.layers[0]._forward_pre_hooks


def test_a_view_of_more_is_copied():
    tensor = torch.arange(10.0)
    assert compact(tensor) is tensor
    part = compact(tensor[2:4])
    assert part.untyped_storage().nbytes() == 8
    assert torch.equal(part, tensor[2:4])
