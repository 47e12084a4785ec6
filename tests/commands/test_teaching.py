"""Whom a recovery learns from. What does not fit is in tests/commands/test_finetune.py."""

from support.finetuning import finetune, load

from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.teaching import load_teacher, student_config


def test_a_teacher_without_an_image_processor_is_given_the_students_pixels(tmp_path, folders, caplog):
    load(folders[1]).save_pretrained(tmp_path / "teacher")
    assert finetune(folders[0], tmp_path / "out", "--teacher_model_name_or_path", str(tmp_path / "teacher")) == 0
    (message,) = [each.getMessage() for each in caplog.records if each.name == "cap_hf.commands.teaching"]
    assert message.startswith(f"The teacher is given the student's pixels, as {tmp_path / 'teacher'} has no image proc")


def test_without_a_name_there_is_no_teacher_and_a_dense_model_was_pruned_with_nothing(folders):
    student, teacher = (ModelArguments(str(each)) for each in folders)
    assert load_teacher(None, student, None) is None
    assert student_config(teacher) is None
    assert student_config(student).num_grads == 77
