"""What a command measures of a model: the accuracy of a classifier, or its features where there are no classes."""

from typing import Any

import datasets
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from cap_hf.commands.common import image_dataset
from cap_hf.data.arguments import DataArguments
from cap_hf.data.evaluation import AccuracyEvaluation
from cap_hf.data.features import FeatureEvaluation
from cap_hf.data.images import make_dataloader
from cap_hf.errors import CAPError
from cap_hf.outputs import check_task
from cap_hf.towers import is_classifier


class Evaluation:
    """Measures a dense model and then others like it, on the same images.

    A classifier is measured by its accuracy. Where there is no head, or no labels, it is the features (of a classifier
    its logits) that are compared with the dense model's; and probed with labels where there are some.

    Args:
        model: one of those to measure.
        splits: `eval`, and `bank` where features are to be probed with labels, see `load_all`.
        image_processor: the model's.
        data_args: which data it is.
        batch_size: examples per step and process.
        accelerator: from accelerate.
        disable_tqdm: no progress bars.
        advice: what to do with a classifier that does not pick one label of several.

    Raises:
        CAPError: as `ImageDataset`, a classifier does not pick one label of several, or the bank is too small or has
            no labels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        splits: dict[str, datasets.Dataset],
        image_processor: Any,
        data_args: DataArguments,
        batch_size: int,
        accelerator: Accelerator,
        disable_tqdm: bool = False,
        advice: str = "do not evaluate it, --do_eval false",
    ) -> None:
        self.dataset = image_dataset(splits["eval"], image_processor, model, data_args)
        self.figures: AccuracyEvaluation | FeatureEvaluation

        def loader(dataset: Any) -> DataLoader:
            return make_dataloader(dataset, batch_size, data_args.dataloader_num_workers, accelerator.device)

        asked, bank = loader(self.dataset), None
        if is_classifier(model) and self.dataset.labelled:
            check_task(model, "accuracy is", advice)
            self.figures = AccuracyEvaluation(asked, accelerator, disable_tqdm)
            return
        if "bank" in splits:
            neighbours = image_dataset(splits["bank"], image_processor, model, data_args)
            if not neighbours.labelled:
                raise CAPError(
                    "k-NN and the linear probe need labelled train images: --knn_bank_size 0 leaves them out"
                )
            bank = loader(neighbours)
        self.figures = FeatureEvaluation(asked, bank, accelerator, disable_tqdm)

    def check_alone(self) -> None:
        """Raise a CAPError if nothing can be said of a model without a dense one to compare it with."""
        if isinstance(self.figures, AccuracyEvaluation) or self.figures.bank is not None:
            return
        if self.dataset.labelled:
            raise CAPError(
                "without a head there is nothing to measure but k-NN and the linear probe, which --knn_bank_size 0 "
                "leaves out, and the distance to a dense model: --dense_model_name_or_path"
            )
        raise CAPError(
            "the images have no labels: name their column with --label_column_name, put the images of each class into "
            "a folder of their own, or name a dense model to compare with, --dense_model_name_or_path"
        )

    def measure_dense(self, model: PreTrainedModel) -> dict[str, float]:
        """Return what is measured of the dense model, with which those measured afterwards are compared."""
        return self.figures.measure_dense(model)

    def measure(self, model: PreTrainedModel) -> dict[str, float]:
        """Return what is measured of a model, and of what it lost: as the `measure` of `figures`, errors as there."""
        return self.figures.measure(model)
