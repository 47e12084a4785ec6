"""A path that is not there is told from a Hub id, before anybody is asked."""

import pytest

from cap_hf.checkpoints.loading import local_folder
from cap_hf.checkpoints.location import check_location
from cap_hf.errors import CAPError


@pytest.mark.parametrize("name", ["vit", "google/vit-base-patch16-224", "timm/vit_small.augreg_in1k", "a/b_c.d-e"])
def test_what_may_be_on_the_hub_passes(name):
    check_location(name)


@pytest.mark.parametrize(
    "name", ["/nope", "./nope", "../nope", "~/nope", "a/b/c", "a\\b", "", "a b", "a/", "-x/y", "x" * 97, "a\n", "\0"]
)
def test_a_path_that_is_not_there_is_named(name):
    for check in (check_location, local_folder):
        with pytest.raises(CAPError) as caught:
            check(name)
        assert str(caught.value) == f"there is no folder {name!r}, and no Hub id has this form"


def test_a_folder_passes_and_a_file_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    (tmp_path / "model.safetensors").touch()
    for name in ("a b", "./a b", str(tmp_path)):
        check_location(name)
    with pytest.raises(CAPError, match="model.safetensors is a file: name the folder"):
        check_location("model.safetensors")
