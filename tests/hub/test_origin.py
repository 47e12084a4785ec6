"""The command line that a report amounts to is read as the arguments that the run had, and as nothing else."""

import json
import shlex
from dataclasses import asdict

from cap_hf.commands.training import read_arguments
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.hub.origin import GRADUAL, PRUNED, RECOVERED, command_line, kind_of, run_of

DATA = {"dataset_name": "d", "max_train_samples": 64, "train_val_split": 0.1, "streaming": True}


def command(report, config, sparsity=0.9):
    kind = kind_of(report)
    return kind, command_line(kind, run_of(report), config.to_dict() if config else {}, sparsity)


def report_of(argv):
    """Return what `cap-hf finetune` writes of these arguments, and how it prunes."""
    model, data, args, training, _, config, _ = read_arguments(argv)
    report = {
        "model_name_or_path": model.model_name_or_path,
        "model_revision": model.model_revision,
        "teacher_model_name_or_path": args.teacher_model_name_or_path,
        "data": asdict(data),
        "training_arguments": training.changed(),
    }
    return json.loads(json.dumps(report)), config


def test_what_is_told_gives_the_same_arguments_again(tmp_path):
    folder = tmp_path / "col"
    folder.mkdir()
    common = ["--model_name_or_path", "col", "--dataset_name", "d", "--max_train_samples", "64", "--use_cpu", "true"]
    common += ["--learning_rate", "3e-5", "--random_flip", "false", "--lr_scheduler_type", "cosine", "--seed", "7"]
    common += ["--label_column_name", "it's", "--streaming", "true"]
    gradual = ["--sparsity_schedule", "0.5,0.9,10,cubic", "--include", "a.*", "b[0]", "--absolute_damp", "true"]
    for extra, kind in (
        (gradual, GRADUAL),
        (["--teacher_model_name_or_path", "t/u", "--model_revision", "v"], RECOVERED),
    ):
        report, config = report_of([*common, *extra])
        found, line = command(report | {"model_name_or_path": str(folder)}, config)
        assert found == kind
        words = shlex.split(line)
        assert words[:2] == ["cap-hf", "finetune"]
        told, told_config = report_of(words[2:])
        assert told == report
        assert told_config == config


def test_the_order_of_a_prune_run():
    report = {"model_name_or_path": "/x/vit", "data": asdict(DataArguments(**DATA))}
    expected = "cap-hf prune --model_name_or_path vit --dataset_name d --train_val_split 0.1 --max_train_samples 64"
    assert command(report, CAPConfig(seed=3)) == (PRUNED, f"{expected} --streaming true --seed 3 --sparsity 0.9")
    for done, config, refit in (
        ({"refit": None}, CAPConfig(), "--refit false "),
        ({"refit": {"examples": 8}}, CAPConfig(), ""),
        ({"refit": {"examples": 8}}, CAPConfig(method="obs", refit=True), "--method obs --refit true "),
        ({}, CAPConfig(method="obs"), "--method obs "),
    ):
        line = f"{expected} --streaming true {refit}--sparsity 0.9"
        assert command(report | {"pruning": {"layers": []} | done}, config) == (PRUNED, line)
    report["healing"] = {"steps": 300, "batch_size": 8, "images": 2400, "learning_rate": 2e-4, "loss_start": 1.0}
    healed = "--sparsity 0.9 --heal_steps 300 --heal_batch_size 8 --heal_learning_rate 0.0002"
    assert command(report, CAPConfig()) == (PRUNED, f"{expected} --streaming true {healed}")
    for bf16, option in ((False, ""), (True, " --heal_bf16 true")):
        report["healing"]["bf16"] = bf16
        assert command(report, CAPConfig()) == (PRUNED, f"{expected} --streaming true {healed}{option}")


def test_too_little_is_told_for_a_command():
    data = {"dataset_name": "d"}
    for report, config in (
        ({}, CAPConfig()),
        ({"model_name_or_path": "m"}, CAPConfig()),
        ({"model_name_or_path": "m", "data": data}, None),
        ({"model_name_or_path": "m", "data": data, "recovered": {"top1": 1.0}}, CAPConfig()),
    ):
        assert command(report, config)[1] is None


def test_what_was_received_is_one_line_of_arguments():
    """Neither a path nor a token nor what no argument can be called gets into the command."""
    training = {"deepspeed": "/home/me/ds.json", "a b; rm": 1, "hub_token": "x", "lr_scheduler_kwargs": {"a": 1}}
    training |= {"run_name": "/home/me/run", "optim": "a\nb `c`", "max_steps": 2}
    report = {"model_name_or_path": "m", "data": {"dataset_name": "/home/me/d", "more": "x"}}
    report |= {"training_arguments": training}
    assert command(report, None) == (
        RECOVERED,
        "cap-hf finetune --model_name_or_path m --dataset_name d --deepspeed ds.json --optim 'a b `c`' --max_steps 2",
    )
