"""The models of a prune come one after the other, each as the compressor's own calls make it."""

import pytest
import torch
from support.asking import asked_for

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.commands.common import load_model
from cap_hf.commands.preparing import prepare
from cap_hf.commands.prune_arguments import PruneArguments
from cap_hf.commands.pruning import prune_each
from cap_hf.commands.search_arguments import SearchArguments
from cap_hf.distributed.accelerator import make_accelerator
from cap_hf.report import Phases


def pruned(folder, **changes):
    asked, phases, found = asked_for(folder, **changes), Phases(), []
    run = prepare(asked, make_accelerator())
    for each in prune_each(run, asked, phases):
        found.append((each, {name: value.clone() for name, value in run.model.state_dict().items()}))
    return run, asked, [record["phase"] for record in phases.records], found


def test_each_sparsity_is_pruned_and_refitted(tiny_checkpoint):
    run, asked, phases, found = pruned(tiny_checkpoint)
    assert phases == ["collect", "prune 0.5", "refit 0.5", "prune 0.75", "refit 0.75"]
    model = load_model(asked.model)
    compressor = CAPCompressor(model, asked.config, disable_tqdm=True).collect(run.loader)
    for (each, weights), sparsity in zip(found, (0.5, 0.75), strict=True):
        compressor.prune(sparsity)
        report = compressor.refit(run.loader)
        assert (each.sparsity, each.steps, each.norms, each.search) == (sparsity, [sparsity], [], None)
        assert each.report == report
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_steps_on_the_way_are_said(tiny_checkpoint):
    arguments = PruneArguments(disable_tqdm=True, do_eval=False, num_recomputations=1)
    _, _, phases, found = pruned(tiny_checkpoint, prune=arguments)
    assert phases == ["prune 0.5", "refit 0.5", "prune 0.75", "refit 0.75"]
    assert [each.steps for each, _ in found] == [[0.5], [0.5, 0.75]]


@pytest.mark.parametrize("refit", [True, False])
def test_what_is_searched_for_is_a_prune_to_what_is_found(tiny_checkpoint, refit):
    search = SearchArguments(max_accuracy_drop=0.03, sparsity_step=0.1, max_search_samples=300)
    config = CAPConfig(num_grads=32, refit_examples=16, refit=refit)
    run, asked, phases, [(each, weights)] = pruned(tiny_checkpoint, search=search, sparsities=[], config=config)
    assert phases == ["collect", "search"]
    assert each.sparsity == each.search.sparsity == each.report.requested_sparsity
    assert each.steps == [each.sparsity]
    assert bool(each.report.refit) == refit
    model = load_model(asked.model)
    compressor = CAPCompressor(model, config, disable_tqdm=True).collect(run.loader)
    compressor.prune(each.sparsity)
    if refit:
        compressor.refit(run.loader)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
