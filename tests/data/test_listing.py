"""Files are found behind links, each once, and belong to the split that their folders are called after."""

import pytest

from cap_hf.data.listing import by_names, has_split_word, is_image, is_metadata, is_picture, list_files
from cap_hf.errors import CAPError


def test_files_are_found_behind_links_once_each(tmp_path):
    for file in ("d/a/1.png", "d/.cache/x/1.png", "d/__MACOSX/1.png", "d/a/.1.png", "d/README.md", "far/b/2.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    root = tmp_path / "d"
    (root / "z").symlink_to(tmp_path / "far")
    (root / "file.png").symlink_to(tmp_path / "far" / "b" / "2.png")
    for name, target in {"a/up": "..", "same": "a", "above": tmp_path}.items():
        (root / name).symlink_to(target)
    (tmp_path / "far" / "b" / "circle").symlink_to(tmp_path / "far")
    listing = list_files(root)
    assert listing.files == ["a/1.png", "file.png", "z/b/2.png"]
    assert listing.followed == ["z"]
    assert listing.inner == ["a/up", "above", "same", "z/b/circle"]
    (root / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CAPError, match="d/gone is a link to .*nowhere, where nothing is: remove or mend it"):
        list_files(root)


def test_kinds_of_files():
    assert [is_image(name) for name in ("a/1.PNG", "1.tiff", "1.zip", "1.txt", "png")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert [is_picture(name) for name in ("a/1.png", "a.ZIP", "a.txt")] == [True, True, False]
    assert [is_metadata(name) for name in ("a/metadata.csv", "metadata.jsonl", "other.csv")] == [True, True, False]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("train/a/1 test/a/1 extra/1", {"train": ["train/a/1"], "test": ["test/a/1"]}),
        ("Training/1 EVAL/1 x.Val_2/1", {"train": ["Training/1"], "validation": ["x.Val_2/1"], "test": ["EVAL/1"]}),
        # The topmost word counts, a folder with two of them does not, and words end where names do.
        ("train/test_tube/1 test/train/1", {"train": ["train/test_tube/1"], "test": ["test/train/1"]}),
        ("train_test_split/dev/1 train_val/1", {"validation": ["train_test_split/dev/1"]}),
        ("latest/1 trainer/1 contest/1", {}),
        # Names of files, where no folder has one; in small letters.
        ("a/test_1.png a/2.png", {"test": ["a/test_1.png"]}),
        ("a/Test_1.png a/2.png", {}),
        ("train/test_1.png", {"train": ["train/test_1.png"]}),
        # A class called Train; not a class.
        ("Car/1 Train/1", {}),
        ("car/1 train/1", {"train": ["train/1"]}),
        ("car/1 x/train/1", {"train": ["x/train/1"]}),
        ("Car/1 Test/1", {"test": ["Test/1"]}),
        ("", {}),
    ],
)
def test_splits_by_names(files, expected):
    assert by_names(files.split()) == expected


def test_words_of_splits():
    assert [has_split_word(path) for path in ("a/Test/b", "train_val", "train/a", "a/latest", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]
