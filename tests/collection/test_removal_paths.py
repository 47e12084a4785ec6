"""What a prune goes by once everything is collected."""

import pytest
import torch
from support.models import build, random_batches

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.collection.batch_norm import statistics_of
from cap_hf.collection.removal_paths import RemovalPaths, check_pattern, compared_bytes, held_bytes, with_changes
from cap_hf.collection.solver import Solver
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError
from cap_hf.patterns import NMPattern
from cap_hf.targets import find_targets


def paths_of(model, tensors=lambda name: {}) -> RemovalPaths:
    return RemovalPaths(find_targets(model), Solver(CAPConfig(method="magnitude"), None), Processes(), tensors)


def test_weights_are_those_of_the_beginning():
    model = build("ViT")
    paths = paths_of(model)
    before = {target.name: target.to_blocks(target.weight.detach()).clone() for target in paths.targets}
    for target in paths.targets:
        target.weight.data.zero_()
    assert all(torch.equal(paths.weights[name], blocks) for name, blocks in before.items())
    assert paths.num_weights == sum(blocks.numel() for blocks in before.values())
    assert paths.count_zeros() == [0] * len(paths.targets)


def test_the_beginning_is_put_back():
    """Weights of targets, and biases and statistics beside them; what else was trained stays."""
    model = build("ResNet")
    norms = statistics_of(model)
    paths = RemovalPaths(
        find_targets(model), Solver(CAPConfig(method="magnitude"), None), Processes(), statistics=norms
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in [*model.parameters(), *norms]:
            value.add_(1.0)
    paths.put_back()
    names = {f"{target.name}.weight" for target in paths.targets}
    names |= {name for name in before if name.endswith(("running_mean", "running_var"))}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in names or not value.is_floating_point()), name


def test_what_is_there_is_not_eliminated_again():
    kept = {}
    model = build("ViT")
    paths = paths_of(model, lambda name: kept.setdefault(name, {}))
    done = []
    paths.eliminate(None, lambda work: lambda count, work: done.append(count))
    assert paths.is_eliminated(None)
    assert not paths.is_eliminated(NMPattern(2, 4))
    names = [target.name for target in paths.targets]
    order = kept["orders"][names[0]]
    del kept["losses"][names[1]]
    called = []
    again = paths_of(model, lambda name: kept.setdefault(name, {}))
    solve = again.solver.eliminate
    again.solver.eliminate = lambda target, *args: (called.append(target.name), solve(target, *args))[1]
    again.eliminate(None, lambda work: lambda count, work: None)
    assert called == [names[1]]
    assert again.orders[names[0]] is order
    # Another pattern has paths of its own.
    again.eliminate(NMPattern(2, 4), lambda work: lambda count, work: None)
    assert set(kept) == {"weights", "orders", "losses", "orders-2-4", "losses-2-4"}


def test_a_pattern_has_to_fit_the_blocks_that_were_collected():
    model = build("ViT")
    check_pattern(find_targets(model), NMPattern(2, 4))
    with pytest.raises(CAPError, match="does not divide the 16 input channels"):
        check_pattern(find_targets(model), NMPattern(2, 3))
    compressor = CAPCompressor(model, CAPConfig(num_grads=8, fisher_block_size=2)).collect(random_batches(model, 8))
    with pytest.raises(CAPError, match=r"was collected in blocks of 2, which 2:4 does not divide: collect with"):
        compressor.prune(allocation="2:4")


def test_a_config_changes_only_where_it_is_told():
    config = CAPConfig(num_grads=7)
    assert with_changes(config, None, None) == config
    changed = with_changes(config, "uniform", "cumulative")
    assert (changed.allocation, changed.selection, changed.num_grads) == ("uniform", "cumulative", 7)
    assert config.allocation == "global"


def test_it_says_what_it_takes():
    paths = paths_of(build("ViT"))
    paths.eliminate(None, lambda work: lambda count, work: None)
    for target in paths.targets:
        kept = (paths.weights, paths.orders, paths.losses)
        assert held_bytes(target, target.num_blocks) == sum(each[target.name].nbytes for each in kept)
        assert compared_bytes(target, target.num_blocks) == paths.losses[target.name].nbytes
