"""A picture can be drawn of any names and any number of layers."""

from cap_hf.hub.picture import draw_sparsity, shorten


def test_a_picture_of_any_names(tmp_path):
    draw_sparsity(["$x^{", "a" * 300, "ä"], [0.0, 0.5, 1.0], 0.5, tmp_path / "x.png")
    draw_sparsity([str(index) for index in range(300)], [0.1] * 300, 0.1, tmp_path / "y.png")
    for name in ("x.png", "y.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "y.png").stat().st_size > 1000


def test_names_keep_their_ends():
    assert shorten("a.b") == "a.b"
    assert shorten("x" * 70 + "end", limit=5) == "...xxend"
