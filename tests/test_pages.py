"""Pages of the documentation whose code is meant to run as it stands."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def sections(page, first, last):
    """The code of a page from one heading up to another."""
    text = (DOCS / page).read_text(encoding="utf-8")
    part = text[text.index(f"\n## {first}\n") : text.index(f"\n## {last}\n")]
    return re.findall(r"```python\n(.*?)```", part, re.DOTALL)


@pytest.mark.filterwarnings("ignore:Fewer filters", "ignore:Filters that lower")
def test_any_model():
    """Outputs, labels, batches and wrapped models, with the values that the comments promise."""
    torch.manual_seed(0)
    blocks = sections("any_model.md", "What the model returns", "torchvision's families")
    assert len(blocks) == 11
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "any_model.md", "exec"), names)
    method, images, binary = names["method"], names["images"], names["binary"]
    assert method.identify([(images, names["several"])]).counts.tolist() == [4, 5, 5]
    on_one_logit = type(method)(binary, "1")
    for_class_1 = on_one_logit.attribute(images, target=1)
    assert torch.equal(on_one_logit.attribute(images, target=0), -for_class_1)
    assert torch.equal(on_one_logit.attribute(images), for_class_1)
    assert on_one_logit.identify([(images, names["labels"] % 2)]).scores.shape == (2, 8)
    bins = torch.bucketize(names["value"], names["edges"])
    assert names["table"].counts.sum() == names["audit"].counts.sum() == 12
    explained = names["regression"]
    own = type(method)(explained, "1")
    low = own.filter_scores(own.attribute(images[bins == 0])).mean(0).double()
    found = own.identify(
        [(images, bins)], target=1, class_names=["low", "middle", "high"], num_filters=1
    )
    assert torch.allclose(found.scores[0], low, atol=1e-6)
    assert names["both"].identify(
        [((images, torch.rand(12, 4)), names["labels"])]
    ).scores.shape == (3, 8)


@pytest.mark.filterwarnings("ignore")
def test_readme(tmp_path, monkeypatch, capsys):
    """As a newcomer copies it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(code_of(ROOT / "README.md"), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("3: 110 images, 5 of 64 filters selected")
    full, small = (float(line) for line in printed.splitlines()[-2:])
    assert full > 0.9
    assert small > 0.7
    assert names["maps"].shape == (4, 1, 8, 8)
    assert (tmp_path / "digits.safetensors").exists()


def test_messages_of_troubleshooting_are_ours():
    """What the page quotes stands in the code, word by word up to what is filled in."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        part.strip()
        for row in re.findall(r"^\| `([A-Z][^`]*)`", text, re.MULTILINE)
        for part in row.split("...")
        if len(part.strip()) > 8
    ]
    assert len(quoted) >= 5
    package = ROOT / "captum_classfilters"
    code = " ".join(path.read_text("utf-8") for path in package.rglob("*.py"))
    code = re.sub(r'"\s+f?"', "", code)  # lines that are joined
    assert not [part for part in quoted if part not in code]


@pytest.mark.filterwarnings("ignore")
def test_identify():
    text = (DOCS / "identify.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(
        r"```python\n(.*?)```", text.split("## Several processes")[0], re.DOTALL
    ):
        exec(compile(block, "identify.md", "exec"), names)
    assert names["table"].scores.shape == (3, 8)
    assert names["tables"].keys() == {"frequency", "contribution", "conductance"}


@pytest.mark.filterwarnings("ignore")
def test_class_filters():
    exec(compile(code_of(DOCS / "class_filters.md"), "class_filters.md", "exec"), {})


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_and_timm():
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    torch.manual_seed(0)
    text = (DOCS / "hugging_face_and_timm.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(first, "hugging_face_and_timm.md", "exec"), names)
    layers, table = names["layers"], names["table"]
    assert (layers.head, layers.feeding_head[-3].name) == ("classifier.1", "resnet.encoder")
    assert table.class_names == ("ant", "bee", "crab")
    assert table.provenance["exact"] is True
    assert type(names["small"]) is type(names["model"])
    exec(compile(second, "hugging_face_and_timm.md", "exec"), names)
    row = names["row"]
    assert (names["layers"].head, row.channel_dim, row.num_filters) == ("head.fc", 3, 288)
    assert names["at_head"].provenance["exact"] is True


# Scripts that still use parameters by names that they had.
OUTDATED = {
    "class_specific_gate_cifar10.py",
    "measurements.py",
    "reproduce_badola.py",
    "spectral.py",
}
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "docs/*.py", "benchmarks/*.py", "tutorials/*.py")
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts and path.name not in OUTDATED
)


def code_of(path):
    """The Python code of a script, or of all blocks of a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def named_by(statement):
    """What an import of ours gives a file, by the names that it has there."""
    source = statement.module or ""
    if source.split(".")[0] != "captum_classfilters":
        return {}
    module = importlib.import_module(source)
    return {alias.asname or alias.name: getattr(module, alias.name) for alias in statement.names}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_calls_what_is_there(path):
    """Imported names exist, and calls of them use parameters that exist."""
    tree, names = ast.parse(code_of(path)), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.update(named_by(node))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", None) not in names:
            continue
        assert isinstance(node.func, ast.Name)
        function = names[node.func.id]
        given = [ast.Name("x")] * sum(not isinstance(a, ast.Starred) for a in node.args)
        unpacked = len(given) < len(node.args) or any(k.arg is None for k in node.keywords)
        words = {keyword.arg: None for keyword in node.keywords if keyword.arg}
        bind = (
            inspect.signature(function).bind_partial
            if unpacked
            else inspect.signature(function).bind
        )
        try:
            bind(*given, **words)
        except TypeError as error:
            pytest.fail(f"{path.name}: {ast.unparse(node)[:100]}: {error}")


@pytest.mark.filterwarnings("ignore")
def test_long_runs():
    text = (DOCS / "long_runs.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "long_runs.md", "exec"), names)
    assert names["merged"].provenance["num_images"] == 480
