"""What must work wherever the wheel is installed without extras; run outside the checkout."""

import contextlib
import importlib
import io
import os
import pkgutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import captum_classfilters as cf
from captum_classfilters import gates, heads, metrics, pruning, spectral, testing, visualize
from captum_classfilters.cli.main import main as command
from captum_classfilters.pruning.weight_compression import encode_weights, kmeans_quantize

QUIET = {"show_progress": False}


def model() -> nn.Module:
    """Two convolutions of 5 and 7 filters, and three classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 3),
    ).eval()


def data() -> list[tuple[Tensor, Tensor]]:
    """Eleven images of three classes; the last batch is smaller."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(11, 1, 6, 6, generator=generator)
    return list(zip(images.split(4), (torch.arange(11) % 3).split(4), strict=True))


def all_names() -> None:
    """Every module can be imported, and every public name is there."""
    for module in pkgutil.walk_packages(cf.__path__, "captum_classfilters."):
        if not module.name.endswith("__main__"):
            room = importlib.import_module(module.name)
            for name in getattr(room, "__all__", ()):
                assert getattr(room, name) is not None, (module.name, name)
    for name in cf.__all__:
        assert getattr(cf, name) is not None, name
    assert version("captum-classfilters") == cf.__version__
    assert (Path(cf.__file__).parent / "py.typed").exists()


def main_job() -> None:
    """Layers, tables, heads, accuracy, metrics."""
    net, images = model(), data()
    assert any(layer.name == "3" for layer in cf.list_filter_layers(net, images[0][0]))
    tables = cf.identify_class_filters(
        {
            "frequency": cf.LayerFilterFrequency(net, "3"),
            "contribution": cf.LayerFilterContribution(net, "3"),
        },
        images,
        num_filters=2,
        significance=cf.LabelPermutation(19),
        **QUIET,
    )
    assert cf.LayerFilterAblation(net, "3").identify(images, **QUIET).scores.shape == (3, 7)
    table = tables["contribution"]
    assert table.scores.shape == (3, 7)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.safetensors"
        table.save(path)
        assert torch.equal(cf.ClassFilters.load(path).scores, table.scores)
    assert str(table)
    assert table._repr_html_()
    small = cf.decompose(net, table)
    assert small(images[0][0]).shape == (4, 3)
    heads.refit_head(small, images, **QUIET)
    cf.accuracy_curve(net, tables, images, num_filters=(1, 2), **QUIET)
    metrics.evaluate_classifier(net, images, **QUIET)
    explained = cf.ClassFilterSaliency(net, "3", table).attribute(images[0][0], target=0)
    assert explained.shape == images[0][0].shape
    gate = cf.FilterGate(net, "3")
    assert gate(torch.ones(4, 7), images[0][0]).shape == (4, 3)


def other_rooms() -> None:
    """Pruning, gates, singular directions, pictures."""
    net, images = model(), data()
    order = cf.GreedyFilterPruning(net, "3").run(images, num_filters=5, **QUIET)
    removed = cf.prune_filters(net, "3", images[0][0], remove=order.order)
    assert removed(images[0][0]).shape == (4, 3)
    gate = cf.ClassSpecificGate(3, 7).attach(net, "3")
    trainer = gates.GatedTrainer(
        net, gate, torch.optim.SGD([*net.parameters(), *gate.parameters()], lr=0.01)
    )
    trainer.fit(images, epochs=1, **QUIET)
    gate.detach()
    assert len(spectral.layer_svd(net[2])) == 7
    table = cf.LayerFilterContribution(net, "3").identify(images, **QUIET)
    visualize.plot_class_filters(table)


def error_of(task: Callable[[], object]) -> str:
    """The ImportError of a task, or of the command line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = task()
    except ImportError as error:
        return str(error)
    assert code == 2, "nothing was missing"
    return said.getvalue()


def absent_extras() -> None:
    """Each function that needs a package which is absent says how to get it."""
    net, images = model(), data()
    table = cf.LayerFilterContribution(net, "3").identify(images, **QUIET)
    hypergraph = spectral.class_hypergraph(torch.eye(4)[:, :3], torch.tensor([0, 1, 2, 0]))
    tasks: list[tuple[str, str, Callable[[], object]]] = [
        ("pandas", "pandas", table.to_pandas),
        ("pandas", "pandas", cf.list_filter_layers(net, images[0][0]).to_pandas),
        ("sklearn", "demo", lambda: command(["demo", "--output", "demo-output"])),
        ("sklearn", "prune", lambda: heads.filter_clusters(torch.rand(4, 3))),
        ("sklearn", "prune", lambda: kmeans_quantize(torch.rand(9), 2)),
        ("sklearn", "prune", lambda: pruning.compress_layer(net, "0", images[0][0], clusters=2)),
        ("bitarray", "prune", lambda: encode_weights(torch.ones(2), torch.ones(1), torch.zeros(2))),
        ("hypernetx", "hypergraph", hypergraph.to_hypernetx),
        (
            "hypernetx",
            "hypergraph",
            lambda: visualize.plot_hypergraph(hypergraph, style="bands"),
        ),
        ("ripser", "persistence", lambda: spectral.persistence(torch.zeros(2, 2).numpy())),
        (
            "torch_pruning",
            "prune",
            lambda: pruning.ClassFilterImportance(net, table, images[0][0]),
        ),
        ("lightning", "lightning", lightning_callback),
    ]
    for package, extra, task in tasks:
        if find_spec(package) is None:
            message = error_of(task)
            assert f"pip install 'captum-classfilters[{extra}]'" in message, (package, message)
            print(f"  without {package}: {message.strip()}")
        else:
            print(f"  {package} is installed")
    assert not os.path.exists("demo-output"), "the demo made a folder before it was refused"


def lightning_callback() -> object:
    """What Lightning is needed for."""
    gated = importlib.import_module("captum_classfilters.gates.gated_lightning")
    return gated.ClassGateCallback(cf.ClassSpecificGate(3, 7))


def main() -> None:
    """Run all, with warnings about what will change as errors where they are ours."""
    warnings.filterwarnings("error", category=DeprecationWarning, module="captum_classfilters")
    for part in (all_names, main_job, other_rooms, absent_extras):
        print(part.__name__, flush=True)
        part()
    assert testing is not None
    print("smoke passed on Python", sys.version.split()[0])


if __name__ == "__main__":
    main()
