"""What a collection and all that follows it would take: how it would go through memory, and how long."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from cap_hf.collection.clock import Clock, PaperClock
from cap_hf.collection.collection import Collection
from cap_hf.collection.costs import Costs, measure
from cap_hf.collection.examples import CalibrationExamples
from cap_hf.collection.forecast import Alike, Forecast, Measured
from cap_hf.collection.hardware import Hardware
from cap_hf.collection.relevance import label_free_loss
from cap_hf.collection.room import spill_folder, unmade
from cap_hf.collection.running import Batch, frozen
from cap_hf.config import CAPConfig
from cap_hf.distributed.processes import Processes
from cap_hf.errors import CAPError, readable


def forecasts(collection: Collection, worlds: Sequence[int], hardware: Hardware | None = None) -> list[Forecast]:
    """Return what a collection and all that follows would take in so many processes, each like this one.

    Args:
        collection: that has not run, and will not.
        worlds: numbers of processes.
        hardware: a GPU for each of them, on paper, without a disk; None for what this process has.

    Raises:
        CAPError: a process has no example, or as of `Collection.run` of the first.
    """
    found, config = [Forecast(world) for world in worlds], collection.config
    clock = Clock(collection.processes.device) if hardware is None else PaperClock(hardware)
    if hardware is not None:
        collection.resources = replace(collection.resources, spill_dir="none")
    first = collection.examples.first()
    everyone = collection.processes.gather_ints(int(first is not None))
    if any(not there for (there,) in everyone) or first is None:
        raise CAPError("the dataloader is empty: no example to forecast from")
    with unmade(collection.resources):
        forward = clock.forward(collection.model, first)
        costs = again = None
        if collection.method.statistic is not None:
            costs = clock.timed(collection.measure(collection.prepare_loss(first_alone=True)), forward, config)
        if collection.afterwards.refits:
            again = clock.timed(_measure_refit(collection, first), forward, CAPConfig())
        trials, rows = clock.trials(config), clock.trials(CAPConfig(allocation=config.allocation))
        measured = Measured(config, collection.afterwards, costs, again, forward, trials, rows)
        available = None if costs is None else clock.available(collection.resources, costs)
        if costs is not None and available is not None and available <= 0:
            left = f"the model takes {readable(costs.model)}, and leaves nothing of the memory that there is"
            return [replace(each, problem=f"{left}: plan for a larger GPU") for each in found]
        for number, each in enumerate(found):
            processes = Alike(each.processes, clock.device)
            try:
                plan = None if costs is None else collection.plan_for(costs, processes, available)
                folder = spill_folder(collection.resources) if plan is not None and plan.spilled else None
                found[number] = measured.forecast(plan, collection.find("row"), processes, folder)
            except CAPError as error:
                found[number] = replace(each, problem=str(error))
    return found


def _measure_refit(collection: Collection, first: Batch) -> Costs:
    """Return what an example costs while layers are refitted."""
    model, config = collection.model, collection.config
    images = {name: value for name, value in first.items() if name != "labels"}
    with frozen(model), torch.no_grad():
        loss = label_free_loss(model, images, config, collection.processes)
    alone = CalibrationExamples([images], CAPConfig(num_grads=len(first["pixel_values"])), Processes())
    alone.use(loss)
    return measure(model, alone, collection.find("row"), loss)
