"""How many processes read images beside the model."""

import os

import pytest
import torch
from support.models import build

from cap_hf.data import workers
from cap_hf.data.images import make_dataloader
from cap_hf.data.workers import num_workers
from cap_hf.recovery import training_arguments
from cap_hf.recovery.training_arguments import SparseTrainingArguments

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("cores", "processes", "expected"), [(64, 1, 8), (6, 1, 5), (6, 2, 2), (2, 4, 0), (1, 1, 0)])
def test_beside_cuda_the_cores_that_are_left_read(cores, processes, expected, monkeypatch):
    monkeypatch.setattr(workers, "usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert num_workers(None, CUDA) == expected
    assert num_workers(None, CPU) == 0
    assert num_workers(3, CUDA) == num_workers(3, CPU) == 3
    assert num_workers(0, CUDA) == 0


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 5, 7}, raising=False)
    assert workers.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert workers.usable_cores() == os.cpu_count()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_loader_for_cuda_reads_beside_it_into_pinned_memory(monkeypatch):
    monkeypatch.setattr(workers, "usable_cores", lambda: 4)
    images = build("ViT")  # never read
    loader = make_dataloader(images, 2, None, CUDA)
    assert (loader.num_workers, loader.pin_memory) == (3, True)
    assert make_dataloader(images, 2, 1, CUDA).num_workers == 1
    loader = make_dataloader(images, 2)
    assert (loader.num_workers, loader.pin_memory) == (0, False)


def test_training_has_the_same_default(tmp_path, monkeypatch):
    usual = {"output_dir": str(tmp_path), "use_cpu": True}
    assert SparseTrainingArguments(**usual).dataloader_num_workers == 0
    assert SparseTrainingArguments(**usual, dataloader_num_workers=2).dataloader_num_workers == 2
    asked = []
    monkeypatch.setattr(training_arguments, "num_workers", lambda wish, device: asked.append((wish, device)) or 4)
    assert SparseTrainingArguments(**usual).dataloader_num_workers == 4
    assert asked == [(None, CPU)]
