"""The page: whole, small, and in a real browser, quiet and without a script that a file has brought along."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from support.chromium import PROGRAM, open_page
from support.runs import benchmark, layer_names, measured, record, recovered, report, search, write, write_run

from cap_hf import CAPError
from cap_hf.checkpoints.replacing import CHARTS
from cap_hf.pages import page
from cap_hf.pages.page import write_page
from cap_hf.pages.runs import find_runs

HOSTILE = '</script></style><script>window.hit=1</script><img src=x onerror="window.hit=1">\'"{{ 7*7 }}${hit}'
READY = "document.documentElement.dataset.drawn !== undefined"
browser = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")


class Elements(HTMLParser):
    """The tags of a page, and the identifiers of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.names += [value for name, value in attrs if name == "id"]


def every_run(folder, name: str = "user/vit-tiny", names: list[str] | None = None):
    """A folder with runs of all kinds, in which everything that can be named has this name."""
    content = report(model_name_or_path=name, versions={"python": name, name: "1"}, search=search())
    content["data"]["dataset_name"] = name
    content["phases"][0]["phase"] = name
    noted = record(names)
    noted["command"] = f"cap-hf prune {name}"
    noted["changed"]["sparsity-0.9"]["shown"][0] |= {"label": name, "sparse": name}
    for result in content["results"]:
        result["pruning"] |= {"method": name}
        for layer, given in zip(result["pruning"]["layers"], names or layer_names(), strict=True):
            layer["name"] = given
    write_run(folder, content, noted)
    write(folder / "recovered" / "report.json", recovered())
    for sparsity in (0.5, 0.9):
        timed = benchmark(sparsity)
        timed["measurements"][1]["backend"] = f"sparse {name}"
        write(folder / f"sparsity-{sparsity:g}" / "benchmark.json", timed)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of runs of all kinds."""
    return write_page(every_run(tmp_path_factory.mktemp("run")))


def test_the_page_is_one_small_file_with_all_charts(written):
    text = written.read_text()
    assert len(text.encode()) < 5e6
    elements = Elements(text)
    shown = [name for name in elements.names if name in CHARTS]
    assert sorted(shown) == sorted(set(CHARTS) - {"training-sparsity"})
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=.?(https?:)?//", text)
    assert "81.00 ± 1.00" in text
    assert "cap-hf prune user/vit-tiny" in text
    for name in shown:
        picture = Image.open(written.parent / "report" / f"{name}.png")
        assert len(picture.convert("L").getcolors()) > 10, name


def test_a_second_page_takes_the_place_of_the_first(tmp_path):
    write_page(every_run(tmp_path))
    (tmp_path / "report" / "mine.png").write_bytes(b"")
    (tmp_path / "recovered" / "report.json").unlink()
    text = write_page(tmp_path).read_text()
    assert "learning-rate" not in Elements(text).names
    pictures = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert "accuracy" in pictures
    assert "mine" in pictures
    assert "learning-rate" not in pictures


def test_what_is_not_there_is_said(tmp_path):
    write_run(tmp_path)
    text = write_page(tmp_path).read_text()
    assert "A run with --report true also notes down" in text
    assert "what its report amounts to" in text
    assert "Changed predictions" not in text


def test_of_several_runs_it_is_said_whose_elimination_is_shown(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, report(name), record())
    assert "Elimination and Fisher are those of a; b: a page of its own." in write_page(tmp_path).read_text()


def test_tiles_compare_no_runs_of_different_models(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", report("magnitude", sparsities=(0.9,)))
    better = report(sparsities=(0.9,), model_name_or_path="user/deit-tiny", dense=measured(0.97, drop=False))
    better["results"][0]["sparse"] = measured(0.95)
    write_run(tmp_path / "c", better)
    sparsity = {each.name: f"{100 * each.sparsity:.4g}" for each in find_runs(tmp_path).models}
    assert page.tiles_of(find_runs(tmp_path)) == [
        ("dense top-1 %", "92.00 ± 1.00", "vit-tiny"),
        (f"top-1 % at {sparsity['a/sparsity-0.9']} %", "81.00 ± 1.00", "11.00 ± 0.50 less than dense vit-tiny"),
        (f"top-1 % at {sparsity['a/sparsity-0.5']} %", "85.00 ± 1.00", "7.00 ± 0.50 less than dense vit-tiny"),
        ("dense top-1 %", "97.00 ± 1.00", "deit-tiny"),
        (f"top-1 % at {sparsity['c/sparsity-0.9']} %", "95.00 ± 1.00", "2.00 ± 0.50 less than dense deit-tiny"),
    ]


def test_nothing_is_written_where_nothing_can_be_read(tmp_path):
    write_run(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(CAPError, match=r"report.json cannot be read"):
        write_page(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_images_are_pngs_and_nothing_else(tmp_path):
    noted = record()
    noted["changed"]["sparsity-0.9"]["shown"][0]["image"] = "https://example.com/x.png"
    text = write_page(write_run(tmp_path / "a", noted=noted)).read_text()
    assert "example.com" not in text
    del noted["changed"]["sparsity-0.9"]["shown"][0]["image"]
    with pytest.raises(CAPError, match="holds no images as a run writes them"):
        write_page(write_run(tmp_path / "b", noted=noted))


def test_half_a_pair_of_surrogates_does_not_end_the_page(tmp_path):
    noted = record()
    noted["command"] = "cap-hf prune \ud800x"
    assert "cap-hf prune ?x" in write_page(write_run(tmp_path, noted=noted)).read_text()


def test_charts_stay_where_the_page_cannot_be_written(tmp_path):
    write_run(tmp_path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(CAPError):
        write_page(tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_what_draws_is_asked_for_in_one_line(tmp_path, monkeypatch):
    def missing(package, extra):
        raise CAPError(f"{package} is not installed: pip install 'cap_hf[{extra}]'")

    monkeypatch.setattr(page, "need", missing)
    with pytest.raises(CAPError, match=r"pip install 'cap_hf\[report\]'"):
        write_page(write_run(tmp_path))


@browser
@pytest.mark.parametrize("how", [{}, {"dark": True}, {"width": 390, "height": 844}, {"width": 800, "media": "print"}])
def test_a_browser_draws_all_charts_and_asks_for_nothing(written, how):
    seen = open_page(
        written,
        [
            "[...document.querySelectorAll('.chart')].filter(each => each.querySelector('svg')).map(each => each.id)",
            "document.documentElement.scrollWidth - document.documentElement.clientWidth",
            "getComputedStyle(document.body).backgroundColor",
            "getComputedStyle(document.querySelector('#accuracy svg text')).fill",
        ],
        ready=READY,
        **how,
    )
    charts, beyond, back, ink = seen.values
    assert sorted(charts) == sorted(set(CHARTS) - {"training-sparsity"})
    assert beyond == 0
    assert seen.console == []
    assert seen.requests == []
    light, dark = (lambda colour: sum(map(int, re.findall(r"\d+", colour)[:3])) > 3 * 128), bool(how.get("dark"))
    assert light(back) is not dark
    assert light(ink) is dark


@browser
def test_a_choice_changes_the_map(written):
    first = "document.querySelector('#sparsity-map .role-mark path').getAttribute('fill')"
    choose = """(async () => {
        const list = document.querySelector('#map-section select');
        list.value = '1';
        list.dispatchEvent(new Event('change'));
        await new Promise(done => setTimeout(done, 200));
        return [...list.options].map(each => each.text);
    })()"""
    before, options, after = open_page(written, [first, choose, first], ready=READY).values
    assert options == ["sparsity-0.5", "sparsity-0.9", "recovered"]
    assert before != after


@browser
def test_a_hostile_name_is_text_everywhere(tmp_path):
    names = [f"{name}.{HOSTILE}" for name in layer_names()]
    written = write_page(every_run(tmp_path, HOSTILE, names))
    hover = """(async () => {
        const told = [];
        for (const mark of document.querySelectorAll('.chart .role-mark path, .chart .role-mark line')) {
            const place = mark.getBoundingClientRect();
            const where = {clientX: place.x + place.width / 2, clientY: place.y + place.height / 2, bubbles: true};
            for (const kind of ['pointerover', 'pointermove']) mark.dispatchEvent(new PointerEvent(kind, where));
            await new Promise(done => setTimeout(done, 5));
            const tip = document.getElementById('vg-tooltip-element');
            if (tip) told.push([tip.textContent, tip.querySelectorAll('img, script').length]);
        }
        return told;
    })()"""
    seen = open_page(
        written, [hover, "window.hit", "document.querySelectorAll('img:not(.images img)').length"], ready=READY
    )
    told, hit, images = seen.values
    assert hit is None
    assert images == 0
    assert seen.console == []
    assert seen.requests == []
    print(len(told), told[:3])
    assert any("window.hit=1" in text for text, _ in told)
    assert all(count == 0 for _, count in told)
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", written.read_text())[0]
