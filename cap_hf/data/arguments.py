"""Which data a command reads. Imports neither torch nor transformers, so that a wrong argument is found at once."""

from dataclasses import dataclass, field

from cap_hf.errors import CAPError


@dataclass
class DataArguments:
    """Which data; names as in run_image_classification.py."""

    dataset_name: str = field(
        default="digits",
        metadata={"help": "A Hub id, a folder of images or parquet files, or 'digits' (embedded)."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split_name: str = field(default="train", metadata={"help": "Split to calibrate and train on."})
    eval_split_name: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: validation, else test."}
    )
    train_val_split: float | None = field(
        default=None, metadata={"help": "Share of the train split to hold out when there is no split to evaluate on."}
    )
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many train examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most this many eval examples."})
    streaming: bool | None = field(
        default=None,
        metadata={
            "help": "Fetch only the examples that are needed and keep them. Default: for a dataset on the Hub, unless "
            "its whole train split is needed."
        },
    )
    shuffle_buffer_size: int = field(
        default=0,
        metadata={
            "help": "Examples of a stream that the next one is drawn from: so many more are read. For datasets of few "
            "files whose neighbours are alike."
        },
    )
    white_level: float | None = field(
        default=None,
        metadata={
            "help": "Value of white in pictures of more than 8 bits. Default: 65535 in 16 bits, 32767 in signed ones, "
            "1.0 in floating point; pictures of 16 bits without a value above 4095 are an error then."
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read images beside the model. Default: on CUDA one less than there are cores for "
            "each process, 8 at most; none on a CPU, whose cores the model needs."
        },
    )

    def __post_init__(self) -> None:
        for name in ("dataloader_num_workers", "shuffle_buffer_size"):
            if (getattr(self, name) or 0) < 0:
                raise CAPError(f"{name}={getattr(self, name)} must be at least 0")
        if not self.dataset_name:
            raise CAPError("--dataset_name is empty: name a folder, a dataset of the Hub, or digits")
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise CAPError(f"train_val_split={self.train_val_split} is not between 0 and 1")
        if self.white_level is not None and not 0 < self.white_level < float("inf"):
            raise CAPError(f"white_level={self.white_level} must be above 0")
