"""The atlas of the digits demo: every link leads somewhere, every picture is told, names are safe."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam
from torch.utils.data import DataLoader, Subset, TensorDataset

from captum_classfilters import LabelPermutation, LayerFilterContribution
from captum_classfilters.atlas import atlas, pictures
from captum_classfilters.atlas.findings import Survey
from captum_classfilters.atlas.layer_pages import clustered
from captum_classfilters.atlas.site import number, percent, slug
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.metrics import evaluate_classifier
from tests.models import ONE_OUTPUT, TwoScores, batches, images, known, one_output, pool_linear

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = [
    '<b>zero</b> & "nought"',
    "o'ne/../one",
    "größe zwei",
    "猫三",
    "a class whose name is seventy characters long, which is more than fits",
    "five",
    "six\\6",
    "seven, one of the sevens",
    "n00000008 eight",
    "{{ nine }}",
]
LABELS = 'filter,label\n3,"a <i>bar</i>, or & two"\n63,last\n'
VOID = {"br", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """What a page links to, shows and calls by an id; refuses what is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text, self.open = "", list[str]()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on")]
        self.open += [tag] if tag not in VOID else []
        self.links += [values[name] for name in ("href", "src") if values.get(name)]
        self.ids += [values["id"]] if "id" in values else []
        self.images += [values] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    data = load_digits(0)
    model = train_classifier(small_cnn(), data.train, 2, show_progress=False)
    few = Subset(data.test.dataset, range(200))
    return model, data.train, DataLoader(few, batch_size=100)


@pytest.fixture(scope="module")
def site(digits, tmp_path_factory):
    model, train, test = digits
    folder = tmp_path_factory.mktemp("atlas")
    labels = folder / "labels.csv"
    labels.write_text(LABELS)
    other = train_classifier(small_cnn(), train, 1, show_progress=False)
    first = atlas(
        model,
        "filters",
        train,
        folder / "site",
        test_dataloader=test,
        class_names=NAMES,
        filter_labels=labels,
        compared={"another <model>": other},
        num_exemplars=3,
        num_images=1,
        num_errors=3,
        show_progress=False,
    )
    return first.parent


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_pages(pages):
    """One for each class and filter, and those that hold them together."""
    kinds = Counter(name.partition("/")[0] for name in pages)
    assert kinds["classes"] == 10
    assert kinds["filters"] == 64
    assert kinds["errors"] == 3
    assert kinds["images"] >= 10
    assert {"index.html", "filters.html", "errors.html", "models.html"} <= set(pages)


def test_every_link_leads_somewhere(site, pages):
    for name, page in pages.items():
        for link in page.links:
            if link.startswith(("#", "data:")):
                assert link == "data:," or link[1:] in page.ids
                continue
            target = (site / name).parent / link
            assert target.is_file(), (name, link)
            assert target.resolve().is_relative_to(site.resolve())


def test_nothing_comes_from_elsewhere(site):
    """No server and no network: no address in any file."""
    for path in site.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            assert not re.search(r"https?://|//cdn|@import", path.read_text(encoding="utf-8")), path


def test_pictures_are_told_and_ids_are_unique(pages):
    assert sum(len(page.images) for page in pages.values()) > 200
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), name
        assert {"main"} <= set(page.ids)
        for image in page.images:
            assert len(image["alt"] or "") > 20, name
    later = [image for image in pages["filters.html"].images if image.get("loading") == "lazy"]
    assert len(later) == len(pages["filters.html"].images) > 50


def test_names_are_text_and_files_are_plain(site, pages):
    raw = (site / "index.html").read_text(encoding="utf-8")
    assert "<b>zero" not in raw
    assert "&lt;b&gt;zero&lt;/b&gt; &amp; " in raw
    for index, name in enumerate(NAMES):
        (page,) = [page for path, page in pages.items() if path.startswith(f"classes/{index:04d}")]
        assert name in page.text
    assert all(re.fullmatch(r"[a-z0-9./-]+", path) for path in pages)
    data = re.search(r'id="map-data">(.*?)</script>', raw, re.DOTALL)
    assert data is not None
    read = json.loads(data[1])
    assert sorted(read["filters"]) == list(range(64))
    assert sorted(short for short, _ in read["classes"])[0] == '<b>zero</b> & "nought"'


def test_labels_of_another_tool(site, pages):
    assert "a <i>bar</i>, or & two" in pages["filters/0003.html"].text
    assert "last" in pages["filters/0063.html"].text
    assert "a &lt;i&gt;bar" in (site / "filters.html").read_text(encoding="utf-8")


def test_numbers_are_the_librarys(digits, pages):
    model, train, test = digits
    accuracy = evaluate_classifier(model, test, show_progress=False).accuracy
    overview = pages["index.html"].text
    assert percent(accuracy) in overview
    table = LayerFilterContribution(model, "filters").identify(
        train, num_filters=5, class_names=NAMES, show_progress=False
    )
    listed = ", ".join(str(index) for index in table.filters_of("five").tolist())
    assert listed in " ".join(overview.split())
    best = int(table.filters_of("five")[0])
    page = pages["classes/0005-five.html"].text
    assert number(float(table.scores[5, best])) in page
    low, high = table.interval()[5, best].tolist()
    assert f"{number(low)} to {number(high)}" in page
    assert (
        "Is it real? It scores more than permuted labels" in pages[f"filters/{best:04d}.html"].text
    )


def test_models_side_by_side(pages):
    assert "another <model>" in pages["models.html"].text
    size = sum(parameter.numel() for parameter in small_cnn().parameters())
    assert pages["models.html"].text.count(number(size)) == 2


def test_the_manifest_lists_all_files(site):
    manifest = json.loads((site / "atlas.json").read_text())
    there = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == there - {"atlas.json"}


# -- small ones --------------------------------------------------------------------------------------


def small(output, *, layers="1", loader=None, **options):
    torch.manual_seed(0)
    model = pool_linear()
    images = torch.rand(12, 2, 8, 8)
    data = TensorDataset(images, torch.arange(12) % 3)
    loader = DataLoader(data, batch_size=5) if loader is None else loader
    options = {"num_images": 0, "num_exemplars": 2, "significance": False, **options}
    return atlas(model, layers, loader, output, show_progress=False, **options)


def test_several_layers_and_again(tmp_path):
    """A folder for each; the pages of an atlas before are gone, what else is there stays."""
    (tmp_path / "mine.txt").write_text("kept")
    first = small(tmp_path, layers=["0", "1"])
    links = Page(first).links
    assert [link for link in links if link.endswith("/index.html")] == [
        "0000-0/index.html",
        "0001-1/index.html",
        "0000-0/index.html",
        "0001-1/index.html",
    ]
    for path in tmp_path.rglob("*.html"):
        for link in Page(path).links:
            assert link.startswith(("#", "data:")) or (path.parent / link).is_file(), (path, link)
    with pytest.raises(ValueError, match="holds an atlas already"):
        small(tmp_path)
    manifest = json.loads((tmp_path / "atlas.json").read_text())
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("kept")
    assert "mine.txt" not in manifest["files"]
    manifest["files"].append("../outside.txt")
    (tmp_path / "atlas.json").write_text(json.dumps(manifest))
    small(tmp_path, overwrite=True)
    assert not list(tmp_path.glob("0000-0/*.html"))
    assert (tmp_path / "mine.txt").read_text() == outside.read_text() == "kept"
    text = Page(tmp_path / "index.html").text
    assert "Filters were found and measured on the same images" in text


IMAGES = TensorDataset(torch.rand(6, 2, 8, 8), torch.arange(6) % 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "conv9"}, "no layer 'conv9'"),
        ({"layers": []}, "name one layer at least"),
        ({"num_filters": 0}, "num_filters=0; expected at least 1"),
        ({"num_images": -1}, "num_images=-1"),
        ({"num_errors": True}, "num_errors=True"),
        ({"filter_labels": {99: "far"}}, "filter_labels name filter 99; '1' has filters 0 to"),
        ({"filter_labels": {"first": "one"}}, "'first' where a filter's number should be"),
        ({"filter_labels": "nowhere.csv"}, "nowhere.csv"),
        ({"class_names": ["a", "b"]}, "class_names has 2 names"),
        ({"loader": DataLoader(IMAGES, batch_size=2, shuffle=True)}, "shuffles"),
        ({"loader": [IMAGES[:]]}, "has no data set whose images could be shown"),
        ({"loader": iter([IMAGES[:]]), "dataset": IMAGES}, "only once"),
    ],
)
def test_what_cannot_be_shown_is_told(tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        small(tmp_path / "site", **options)
    assert not (tmp_path / "site" / "atlas.json").exists()


def test_images_of_a_list(tmp_path):
    """Batches in a list have no data set: the images are handed over beside them."""
    first = small(tmp_path, loader=[IMAGES[:]], dataset=IMAGES[:][0], num_images=1)
    assert len(list(tmp_path.glob("images/*.html"))) >= 3
    assert first == tmp_path / "index.html"


def test_answers_without_filters_are_explained_for_the_own_class(tmp_path):
    """Images of two of three classes: what is taken for the third is shown all the same."""
    torch.manual_seed(0)
    model = pool_linear()
    model[-1].bias.data = torch.tensor([0.0, 0.0, 100.0])
    data = TensorDataset(torch.rand(8, 2, 8, 8), torch.arange(8) % 2)
    options: dict[str, Any] = {"num_filters": 2, "num_images": 1, "show_progress": False}
    atlas(model, "1", DataLoader(data, batch_size=4), tmp_path, **options)
    (first, *_) = sorted(tmp_path.glob("classes/0000*.html"))
    text = " ".join(Page(first).text.split())
    assert "wrong 0 taken for 2" in text
    assert "explained for 0, since the answer's class has no filters here" in text
    assert "1 class without images has its bias alone" in " ".join(
        Page(tmp_path / "index.html").text.split()
    )


def test_names_of_files():
    assert slug(3, "a/b\\c:d?e") == "0003-a-b-c-d-e"
    assert slug(12345, "") == "12345"
    assert len(slug(1, "x" * 300)) == 45
    assert slug(0, "..") == "0000"


def test_clustered():
    """Rows of one kind stand together; a row of zeros has no direction and breaks nothing."""
    kinds = torch.eye(3).repeat(2, 1) + 0.01 * torch.rand(6, 3)
    order = clustered(torch.cat([kinds, torch.zeros(1, 3)]))
    assert sorted(order) == list(range(7))
    known = [row % 3 for row in order if row < 6]
    assert sum(a != b for a, b in pairwise(known)) == 2
    assert clustered(torch.rand(1, 4)) == [0]


def test_the_seed_is_that_of_everything_random():
    model, x = pool_linear(filters=12), torch.randn(60, 2, 6, 6)
    with torch.no_grad():  # every class is the answer to some images
        model.get_parameter("4.bias").sub_(model(x).mean(0))
        loader = DataLoader(TensorDataset(x, model(x).argmax(1)), batch_size=20)
    options: dict[str, Any] = {"num_filters": 2, "num_exemplars": 1, "class_names": None}
    found = []
    for seed in (0, 1, 1):
        survey = Survey(model, loader, loader, {"show_progress": False}, seed)
        found.append(survey.layers(["1"], significance=True, **options)["1"])
        own = LabelPermutation(seed=7)
        given = survey.layers(["1"], significance=own, **options)["1"].table
        assert given.provenance["significance"]["seed"] == 7
    drawn = [
        (
            known(layer.curve).random_mean,
            known(layer.class_curves).necessity["random"].tolist(),
            known(layer.table.p_values).tolist(),
        )
        for layer in found
    ]
    assert drawn[1] == drawn[2]
    assert not any(a == b for a, b in zip(*drawn[:2], strict=True))
    assert [layer.table.provenance["significance"]["seed"] for layer in found] == [0, 1, 1]


@pytest.mark.parametrize("kind", ONE_OUTPUT)
def test_pictures_explain_the_classes_of_one_output(kind, monkeypatch, tmp_path):
    """Of -z for class 0 and z for class 1, by every method that is drawn."""
    model, drawn = one_output(kind), []
    table = LayerFilterContribution(model, "1").identify(
        [(x, y.clamp(max=1)) for x, y in batches()], num_filters=2, show_progress=False
    )
    given, target = images()[:5], torch.tensor([0, 1, 1, 0, 1])

    def keep(_images, maps, **_options):
        drawn.append(maps)
        return None, 0

    monkeypatch.setattr(pictures, "plot_explanations", keep)
    monkeypatch.setattr(pictures, "write_figure", lambda *_, **__: None)
    shown = pictures.ShownImages(list(given / 10 + 0.5))
    pictures.write_explained(tmp_path.joinpath, model, table, shown, range(5), target.tolist())
    x, two = shown.inputs(range(5)), TwoScores(model)
    wanted = {
        "Integrated Gradients": IntegratedGradients(two).attribute(x, target=target, n_steps=20),
        "Grad-CAM": LayerAttribution.interpolate(
            LayerGradCam(two, model[1]).attribute(x, target=target), (6, 6), "bilinear"
        ),
    }
    for name, maps in wanted.items():
        torch.testing.assert_close(torch.cat([columns[name] for columns in drawn]), maps)
