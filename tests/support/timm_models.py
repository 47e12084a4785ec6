"""Tiny models of timm behind transformers' TimmWrapper."""

from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperModel, set_seed

from support.families import perturbed


def build(architecture: str, head: bool = True, **arguments):
    """Return a model of timm in eval mode, with a head for 3 classes or none, with noise on its weights."""
    set_seed(0)
    config = TimmWrapperConfig(architecture=architecture, num_labels=3, model_args=arguments)
    return perturbed((TimmWrapperForImageClassification if head else TimmWrapperModel)(config))
