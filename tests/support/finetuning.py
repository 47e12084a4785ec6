"""`cap-hf finetune` as a user types it, on models that take no time."""

from pathlib import Path

from transformers import AutoModelForImageClassification, PreTrainedModel

from cap_hf.commands.main import main
from support.image_files import jpegs

NAMES = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}, "num_labels": 10}
QUICK = [
    *("--max_train_samples", "96", "--max_eval_samples", "60", "--max_steps", "4"),
    *("--per_device_train_batch_size", "16", "--learning_rate", "1e-2", "--use_cpu", "True", "--disable_tqdm", "True"),
]


def finetune(student: Path, output: Path, *arguments: str) -> int:
    """Run the command; return its exit code."""
    return main(["finetune", "--model_name_or_path", str(student), "--output_dir", str(output), *QUICK, *arguments])


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder)


def unlabelled_folder(folder: Path) -> Path:
    """Images in colour of 8x8, to train on and to test with, without labels; return the folder."""
    for index, image in enumerate(jpegs(48, 8)):
        path = folder / ("test" if index % 3 == 0 else "train") / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return folder
