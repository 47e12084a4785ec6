"""What `cap-hf prune` loads and checks before it begins, from its arguments."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from cap_hf.checkpoints.form import StoredForm
from cap_hf.collection.batch_norm import batch_norms
from cap_hf.collection.examples import whole_groups
from cap_hf.collection.objective import check_loss
from cap_hf.collection.searching import sparsity_grid
from cap_hf.commands.budgeting import with_example
from cap_hf.commands.common import image_dataset, load_all, load_companions, load_form
from cap_hf.commands.evaluation import Evaluation
from cap_hf.commands.healing import Healing
from cap_hf.commands.prune_arguments import Asked
from cap_hf.commands.searching import HeldOut, hold_out
from cap_hf.compressor import CAPCompressor
from cap_hf.data.images import ImageDataset, calibration_split, collate, make_dataloader
from cap_hf.errors import CAPError
from cap_hf.method.methods import METHODS
from cap_hf.patterns import unit_of
from cap_hf.stepwise import check_steps


@dataclass
class Run:
    """What a prune works with.

    Attributes:
        model: dense.
        image_processor: its own.
        companions: files that go wherever its weights go.
        form: that its weights are stored in.
        accelerator: from accelerate.
        compressor: of the model; it has collected nothing.
        calibration: the examples that gradients, and layers to refit to, are taken from.
        loader: of them.
        refits: whether layers are refitted after pruning.
        recalibrates: whether batch norm is estimated anew.
        healing: None where nothing is healed.
        evaluation: None where nothing is evaluated.
        held_out: scores models for a search; None where nothing is searched for.
        evaluated: images that an evaluation reads.
    """

    model: PreTrainedModel
    image_processor: Any
    companions: list[Path]
    form: StoredForm
    accelerator: Accelerator
    compressor: CAPCompressor
    calibration: ImageDataset
    loader: DataLoader
    refits: bool
    recalibrates: bool
    healing: Healing | None
    evaluation: Evaluation | None
    held_out: HeldOut | None
    evaluated: int


def prepare(asked: Asked, accelerator: Accelerator) -> Run:
    """Load the model and the splits of the data, and check all that can be checked before any work.

    Args:
        asked: the arguments.
        accelerator: from accelerate.

    Raises:
        CAPError: something cannot be loaded, or does not fit together.
    """
    args, search, heal, config, data = asked.prune, asked.search, asked.heal, asked.config, asked.data
    refits = METHODS[config.method].refits(config)
    num_examples = max(config.num_examples, config.refit_examples if refits else 0)
    check_steps(config, args.num_recomputations, refits)
    bank = asked.probe.knn_bank_size
    model, image_processor, splits = load_all(
        asked.model,
        data,
        config.seed,
        ["train", "eval"] if args.do_eval else ["train"],
        search.num_images
        + max(
            num_examples + (bank if search.max_drop_metric == "knn" else 0),
            heal.num_images(accelerator.num_processes),
        ),
        bank,
        num_examples + search.num_images,
    )
    companions, form = load_companions(asked.model), load_form(asked.model, model)
    prunes = 1 if args.num_recomputations else max(1, len(asked.sparsities))
    compressor = CAPCompressor(
        model, config, accelerator, args.disable_tqdm, asked.resources, prunes, form.dtype, refits
    )
    if search.num_images:
        # In time for the plan: where sums are not kept, each try goes through the examples again.
        compressor.afterwards = replace(compressor.afterwards, rounds=search.most_evaluations)
    calibration = image_dataset(
        calibration_split(splits["train"], num_examples, config.seed), image_processor, model, data
    )
    asked.sparsities = with_example(asked.sparsities, calibration)
    for sparsity in asked.sparsities:
        compressor.check_sparsity(sparsity)
    if config.fisher_loss == "labels":
        calibration.need_labels()
    if config.fisher_loss is not None:
        check_loss(config.fisher_loss, model, collate([calibration[0]]))
    batch_size, workers = whole_groups(args.per_device_batch_size, config), data.dataloader_num_workers
    loader = make_dataloader(calibration, batch_size, workers, accelerator.device)
    measuring = (image_processor, data, args.per_device_eval_batch_size, accelerator, args.disable_tqdm)
    held_out, healed_on = None, splits["train"]
    if search.num_images:
        held, healed_on = hold_out(splits["train"], num_examples, search.num_images, config.seed)
        held_out = HeldOut(search.max_drop_metric, model, held, healed_on, bank, *measuring)
        sparsity_grid(search.sparsity_step, compressor.targets, unit_of(config.structure))
    healing = None
    if heal.heal_steps:
        images = image_dataset(healed_on, image_processor, model, data)
        healing = Healing(model, images, heal, config.seed, workers, accelerator, args.disable_tqdm)
    evaluation = Evaluation(model, splits, *measuring) if args.do_eval else None
    evaluated = len(splits["eval"]) + len(splits.get("bank", ())) if args.do_eval else 0
    norms = batch_norms(model)
    if args.recalibrate_batch_norm and not norms:
        raise CAPError(f"{type(model).__name__} has no batch norm: leave --recalibrate_batch_norm out")
    recalibrates = bool(norms) if args.recalibrate_batch_norm is None else args.recalibrate_batch_norm
    return Run(
        model,
        image_processor,
        companions,
        form,
        accelerator,
        compressor,
        calibration,
        loader,
        refits,
        recalibrates,
        healing,
        evaluation,
        held_out,
        evaluated,
    )
