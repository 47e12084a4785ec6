"""The model card: facts from a checkpoint and its report, rendered by `huggingface_hub.ModelCard`.

What a checkpoint or its report does not say is left out of the card. Names come from elsewhere and are taken as text:
on one line, with what Markdown, HTML or YAML would act on made harmless.
"""

import html
import json
import os
import re
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cap_hf.checkpoints.folder import read_cap_config, read_report
from cap_hf.checkpoints.loading import check_folder, load_checkpoint
from cap_hf.checkpoints.metrics import Measured, measured_in
from cap_hf.checkpoints.quantized import dequantize
from cap_hf.checkpoints.weights import measure
from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError
from cap_hf.hub.task import CLASSIFICATION, loader_name, pipeline_tag, purpose
from cap_hf.masks import describe_masks, differing_layers, find_pattern, take_masks
from cap_hf.outputs import label_names
from cap_hf.targets import find_targets

CARD_NAME, PICTURE_NAME = "README.md", "sparsity.png"
MAX_LABELS = 12
METHOD_TEXTS = {
    "cap": "Pruned with CAP, the Correlation-Aware Pruner (arXiv 2210.09223), by cap_hf.",
    "obs": "Pruned by cap_hf with a block Fisher but without correlations between weights (as oBERT does).",
    "sparsegpt": "Pruned by cap_hf with one input Hessian per layer (as SparseGPT does).",
    "magnitude": "Pruned by cap_hf: the weights of the smallest magnitude were removed.",
}


@dataclass
class CardFacts:
    """What a card says. None and empty mean unknown.

    Attributes:
        repo_id: the name to load the model by.
        sparsity: share of the targets' weights that are 0, in [0, 1].
        pipeline_tag: of the Hub, by what the model is for.
        loader: the class of transformers to load it with.
        pattern: N:M, if every target keeps to it.
        layers: of each target what `describe_masks` says.
        labels: the names of the classes that it tells apart, where it does.
        dense, sparse: what was measured, accuracies in [0, 1]; quantization: of the weights, where they are no floats.
        file_bytes: of the weight files; dense_bytes, compressed_bytes: of their tensors in either form.
    """

    repo_id: str
    architecture: str
    pipeline_tag: str
    loader: str
    num_parameters: int
    layers: list[dict]
    pattern: str | None
    labels: list[str]
    compressed: bool
    file_bytes: int
    dense_bytes: int
    compressed_bytes: int
    quantization: str | None = None
    base_model: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    dense: Measured = field(default_factory=Measured)
    sparse: Measured = field(default_factory=Measured)
    config: dict = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        return sum(layer["num_weights"] for layer in self.layers)

    @property
    def sparsity(self) -> float:
        return sum(layer["num_zeros"] for layer in self.layers) / self.num_weights

    @classmethod
    def gather(
        cls,
        folder: str | Path,
        repo_id: str,
        base_model: str | None = None,
        license: str | None = None,
        trust_remote_code: bool = False,
    ) -> "CardFacts":
        """Read a checkpoint folder, plain or compressed.

        Args:
            folder: with config.json, safetensors weights, and report.json and cap_config.json if there are.
            repo_id: the name the card tells to load.
            base_model: Hub id of the dense model; None for the one in the report.
            license: of the model; None for the base model's.
            trust_remote_code: run the code that the checkpoint brings along.

        Raises:
            CAPError: the checkpoint cannot be read or loaded, a file of it is damaged, or its weights are not the ones
                that its report describes.
        """
        folder = Path(folder)
        report, settings = read_report(folder), read_cap_config(folder)
        files = check_folder(folder, trust_remote_code)
        dense_bytes, compressed_bytes = measure(folder)
        config = settings.to_dict() if settings else {}
        model = load_checkpoint(folder, trust_remote_code, "float32")
        quantization = dequantize(model)
        targets = find_targets(model, "row", config.get("include"), config.get("exclude"))
        masks = take_masks(targets)
        wrong = differing_layers(find_targets(model), report)
        if wrong:
            raise CAPError(
                f"{folder / 'report.json'} is not about these weights ({wrong[0]} has other zeros): "
                "evaluate and save the checkpoint again, or remove its report"
            )
        patterns = {str(find_pattern(target, masks[target.name]) or "") for target in targets}
        data = report.get("data") or {}
        tag = pipeline_tag(model)
        return cls(
            repo_id=repo_id,
            architecture=type(model).__name__,
            pipeline_tag=tag,
            loader=loader_name(model),
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=describe_masks(targets),
            pattern=(patterns.pop() or None) if len(patterns) == 1 else None,
            # Without a head a config still has transformers' own names of two classes.
            labels=list(label_names(model.config).values()) if tag == CLASSIFICATION else [],
            compressed=files.compressed,
            file_bytes=files.num_bytes,
            dense_bytes=dense_bytes,
            compressed_bytes=compressed_bytes,
            quantization=quantization,
            base_model=base_model or report.get("model_name_or_path"),
            license={"license": license} if license else base_license(base_model or report.get("model_name_or_path")),
            dataset=data.get("dataset_name"),
            dataset_config=data.get("dataset_config_name"),
            dataset_split=data.get("eval_split_name"),
            dense=report.get("dense") or {},
            # A recovered checkpoint's report also says how accurate it was before.
            sparse=report.get("recovered") or report.get("sparse") or {},
            config=config,
            seed=report.get("seed", config.get("seed")),
            versions=report.get("versions") or {},
        )

    def metadata(self) -> ModelCardData:
        """Return the card's YAML block, for the Hub."""
        tags = ["sparse", "pruned", f"sparsity-{100 * self.sparsity:.0f}", self.pattern or "unstructured"]
        method = self.config.get("method")
        if method:
            tags.insert(2, method)
        dataset, name = hub_id(self.dataset), short_name(self.dataset)
        results = [
            EvalResult(
                task_type=self.pipeline_tag,
                dataset_type=dataset or name,
                dataset_name=name,
                dataset_config=self.dataset_config and one_line(self.dataset_config),
                dataset_split=self.dataset_split and one_line(self.dataset_split),
                metric_type="accuracy",
                metric_name=metric.accuracy,
                metric_value=self.sparse[metric.key],
            )
            for metric in measured_in([self.sparse])
            if name and metric.accuracy
        ]
        base_model = hub_id(self.base_model)
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=self.pipeline_tag,
            base_model=base_model,
            base_model_relation="finetune" if base_model else None,
            datasets=[dataset] if dataset else None,
            tags=tags,
            metrics=["accuracy"] if results else None,
            model_name=one_line(self.repo_id.split("/")[-1]) if results else None,
            eval_results=results or None,
            license=self.license.get("license"),
            license_name=self.license.get("license_name"),
            license_link=self.license.get("license_link"),
        )

    def render(self) -> ModelCard:
        """Return the card, as `huggingface_hub` and the Hub read it."""
        facts: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        method: str | None = self.config.get("method")
        base_model = hub_id(self.base_model)
        metrics = measured_in([self.sparse])
        link = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else None
        return ModelCard.from_template(
            self.metadata(),
            template_str=template_path().read_text(encoding="utf-8"),
            **facts
            | {
                "title": text(self.repo_id.split("/")[-1]),
                "layers": [layer | {"name": text(layer["name"])} for layer in self.layers],
                "labels": [text(label) for label in self.labels[:MAX_LABELS]],
                "num_labels": len(self.labels),
                "sparsity": self.sparsity,
                "num_weights": self.num_weights,
                "base_model_name": link or (self.base_model and text(short_name(self.base_model))),
                "dataset_name": self.dataset and text(short_name(self.dataset)),
                "dataset_split": self.dataset_split and text(self.dataset_split),
                "purpose": purpose(self.pipeline_tag),
                "is_classifier": self.pipeline_tag == CLASSIFICATION,
                "metrics": metrics,
                "dense": self.dense if all(metric.key in self.dense for metric in metrics) else {},
                "method": method,
                "method_text": METHOD_TEXTS.get(method or ""),
                "command": code(self.command()),
                "config": code(json.dumps(self.config, indent=2)) if self.config else None,
                "versions": [text(f"{name} {version}") for name, version in self.versions.items()],
                "picture": PICTURE_NAME,
                "percent": lambda value: f"{100 * value:.2f}",
            },
        )

    def command(self) -> str | None:
        """Return the `cap-hf prune` call that the report's arguments amount to; folders go by their last name."""
        if not (self.base_model and self.dataset and self.config):
            return None
        defaults = CAPConfig().to_dict()
        arguments = {
            "model_name_or_path": hub_id(self.base_model) or short_name(self.base_model),
            "dataset_name": hub_id(self.dataset) or short_name(self.dataset),
        }
        arguments |= {name: value for name, value in self.config.items() if value != defaults.get(name)}
        if ":" not in str(self.config.get("allocation")):
            arguments["sparsity"] = f"{self.sparsity:.4f}".rstrip("0").rstrip(".")
        words = ["cap-hf", "prune"]
        for name, value in arguments.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return " ".join(shlex.quote(one_line(word)) for word in words)


def template_path() -> Path:
    """Return the path of the card's template, which lies beside what fills it."""
    return Path(__file__).with_name("template.md")


def base_license(base_model: str | None) -> dict[str, str]:
    """Return the license fields of the base model's own card, or none if it has no card within reach."""
    if not base_model:
        return {}
    path = Path(base_model) / CARD_NAME
    try:
        if os.path.isdir(base_model):
            data = ModelCard.load(path, ignore_metadata_errors=True).data if path.is_file() else None
        else:
            name = hub_id(base_model)
            data = ModelCard.load(name, ignore_metadata_errors=True).data if name else None
    except Exception:  # no network, no card, a card that is no YAML: the license is unknown then
        return {}
    found = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    if not isinstance(found["license"], str) or not re.fullmatch(r"[\w.+-]+", found["license"]):
        return {}
    return {name: one_line(value) for name, value in found.items() if isinstance(value, str)}


def hub_id(name: str | None) -> str | None:
    """Return a name if it can be a repository on the Hub and is no folder here, else None."""
    if not name or "/" not in name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def short_name(name: str | None) -> str | None:
    """Return a Hub id as it is, and of a folder only its own name, not where it lies."""
    return name and (hub_id(name) or one_line(Path(name).name or name))


def one_line(value: Any) -> str:
    """Return text without line breaks and control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def text(value: Any) -> str:
    """Return text that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_{}\[\]()!|~$])", r"\\\1", html.escape(one_line(value), quote=False))


def code(value: str | None) -> str | None:
    """Return text that cannot end the code block it stands in."""
    return value and value.replace("`", "'")
