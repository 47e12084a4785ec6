"""Names of folders and repositories are told apart, and are text wherever they stand."""

from cap_hf.hub.names import code, hub_id, link, short_name, text


def test_names_of_folders_and_of_repositories():
    assert hub_id("facebook/deit-small") == "facebook/deit-small"
    for name in (None, "", "digits", "/a/b", "../a/b", "a/b/c", "a b/c"):
        assert hub_id(name) is None
    assert short_name("/a/b") == "b"
    assert text("a_b*c <i>") == "a\\_b\\*c &lt;i&gt;"
    assert code("a`b") == "a'b"


def test_only_repositories_are_linked():
    assert link("a/b") == "[a/b](https://huggingface.co/a/b)"
    assert link("/x/a_b") == "a\\_b"
    assert link(None) is None
