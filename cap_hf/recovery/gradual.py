"""One pruning step of a gradual run: a fresh Fisher of the model as it is, then CAP."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from cap_hf.collection.resources import Resources
from cap_hf.compressor import CAPCompressor
from cap_hf.config import CAPConfig
from cap_hf.report import PruneReport


@dataclass
class GradualPruner:
    """What `SparseTrainer` calls for a pruning step.

    Attributes:
        dataloader: calibration examples in a fixed order, so that a step repeated after a crash prunes the same.
        config: how to prune.
        disable_tqdm: no progress bars.
        resources: memory and passes of a step; `Resources()` if None.
    """

    dataloader: DataLoader
    config: CAPConfig
    disable_tqdm: bool = False
    resources: Resources | None = None

    def __call__(self, model: PreTrainedModel, sparsity: float, accelerator: Accelerator) -> PruneReport:
        """Prune the model in place.

        Raises:
            CAPError: as `CAPCompressor.collect` and `prune`.
        """
        compressor = CAPCompressor(model, self.config, accelerator, self.disable_tqdm, self.resources)
        return compressor.collect(self.dataloader).prune(sparsity)
