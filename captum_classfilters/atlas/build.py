"""The atlas: a site about a model's class filters that opens from disk."""

import csv
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from captum_classfilters._core.arguments import arguments_checked
from captum_classfilters._core.files import AnyPath, read_text
from captum_classfilters._core.names import listed_names
from captum_classfilters._core.types import ClassNames, Dataloader, DatasetLike, Keywords, Unpack
from captum_classfilters.atlas.findings import Survey
from captum_classfilters.atlas.layer_pages import LayerPages, Optimized, Shown
from captum_classfilters.atlas.pictures import ShownImages
from captum_classfilters.atlas.site import Site, slug
from captum_classfilters.class_filters import ClassFilters
from captum_classfilters.identify import LabelPermutation
from captum_classfilters.visualize import FeatureObjective, visualize_features


@arguments_checked
def atlas(
    model: nn.Module,
    layers: str | Sequence[str],
    dataloader: Dataloader,
    output: str | os.PathLike[str],
    *,
    test_dataloader: Dataloader | None = None,
    dataset: DatasetLike | None = None,
    title: str | None = None,
    class_names: ClassNames | None = None,
    filter_labels: Mapping[int, str] | AnyPath | None = None,
    compared: Mapping[str, nn.Module] | None = None,
    num_filters: int = 5,
    num_exemplars: int = 6,
    num_images: int = 2,
    num_errors: int = 8,
    num_optimized: int = 0,
    significance: bool | LabelPermutation = True,
    to_display: Callable[[Tensor], Tensor] | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    unpack: Unpack | None = None,
    show_progress: bool = True,
) -> Path:
    r"""
    Write a static site about a model's class filters; it opens from disk, without a server.

    An overview: classes by filters in clustered order, accuracy against the number of filters beside
    random ones, all classes to search and sort. A page for each class: its filters with intervals,
    q-values and the patches that drive them, whether they are needed and suffice, which classes share
    them, where they look on right and wrong answers. A page for each filter, for each image that is
    explained, and for each of the largest cells of the confusion matrix. Everything is measured by
    this package's public functions, with contributions to the classes' scores as evidence.

    Args:

        model (nn.Module): A classifier of images (N, C, H, W). It is left as found.
        layers (str or sequence of str): Dotted name of the layer, or several; see
                    :func:`captum_classfilters.list_filter_layers`.
        dataloader (iterable): Batches of (images, labels) on which filters are found; it may shuffle.
        output (path): Folder for the site; its first page is ``index.html``.
        test_dataloader (iterable, optional): Other images, in an order that stays: filters are
                    measured on them, and they are what is shown. By default the same images,
                    which the pages say.
                    Default: None
        dataset (sequence, optional): ``dataset[i]`` is image i of ``test_dataloader``, or a pair that
                    starts with it. By default the loader's own.
                    Default: None
        title (str, optional): Title of the site; by default model and layer.
        class_names (sequence of str, optional): C names; by default those of the data set.
        filter_labels (mapping or path, optional): What filters are said to see, by another tool: text
                    by filter, or a CSV file of filter and text.
                    Default: None
        compared (mapping, optional): Other models by name, pruned, decomposed or repaired: their
                    accuracies, sizes and filters stand beside the model's.
                    Default: None
        num_filters (int): Filters to select for each class.
                    Default: 5
        num_exemplars (int): Patches to show of each filter.
                    Default: 6
        num_images (int): Images of each class to explain: so many right answers, and so many wrong.
                    Default: 2
        num_errors (int): Cells of the confusion matrix that get a page.
                    Default: 8
        num_optimized (int): Filters that get an optimized image, those that most classes select.
                    Default: 0
        significance (bool or LabelPermutation): Test each cell against permuted labels; a
                    ``LabelPermutation`` has its own seed.
                    Default: True
        to_display (Callable, optional): From an image to one in [0, 1], the inverse of a
                    normalization for example; by default each is stretched by itself.
                    Default: None
        normalize (Callable, optional): From images in [0, 1] to what the model takes, for optimized
                    images.
                    Default: None
        seed (int): Of everything random.
                    Default: 0
        overwrite (bool): Replace an atlas that is in the folder.
                    Default: False
        unpack (Callable, optional): From a batch of another kind to the pair (inputs, labels).
                    Default: None
        show_progress (bool): Show progress bars.
                    Default: True

    Returns:
        *Path* of the first page.

    Raises:
        ValueError: A layer, a label or the folder is not what it should be, the loader shuffles, or
                    nothing can be shown of its images.
        ImportError: The extra ``atlas`` is not installed.

    Examples::

        >>> import tempfile, torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from captum_classfilters.atlas import atlas
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> images = torch.rand(8, 1, 6, 6)
        >>> loader = DataLoader(TensorDataset(images, torch.arange(8) % 2), batch_size=4)
        >>> page = atlas(net, "1", loader, tempfile.mkdtemp(), num_filters=2, num_images=0,
        ...              show_progress=False)
        >>> page.name
        'index.html'
    """
    names = [layers] if isinstance(layers, str) else list(dict.fromkeys(layers))
    if not names:
        raise ValueError("layers are empty; name one layer at least.")
    for option, value, least in (
        ("num_filters", num_filters, 1),
        ("num_exemplars", num_exemplars, 1),
        ("num_images", num_images, 0),
        ("num_errors", num_errors, 0),
        ("num_optimized", num_optimized, 0),
    ):
        if value < least:
            raise ValueError(f"{option}={value}; expected at least {least}.")
    site = Site(Path(output), overwrite)
    test = dataloader if test_dataloader is None else test_dataloader
    images = ShownImages(_images_of(test) if dataset is None else dataset, to_display)
    labels = _labels(filter_labels)
    options = {"unpack": unpack, "show_progress": show_progress}
    survey = Survey(model, dataloader, test, options, seed)
    found = survey.layers(
        names,
        num_filters=num_filters,
        num_exemplars=num_exemplars,
        class_names=listed_names(class_names),
        significance=significance,
    )
    for name in names:
        _check_labels(labels, name, found[name].table.num_filters)
    answers = survey.answers()
    tables = {name: layer.table for name, layer in found.items()}
    others = {
        name: survey.compared(other, tables, num_filters)
        for name, other in (compared or {}).items()
    }
    shown = Shown(
        title=title or f"{type(model).__name__}, {', '.join(names)}",
        model=model,
        images=images,
        answers=answers,
        labels=labels,
        same_images=test_dataloader is None,
        num_images=num_images,
        num_errors=num_errors,
        compared=others,
    )
    ascent = {"normalize": normalize, "seed": seed, "show_progress": show_progress}
    for place, name in enumerate(names):
        folder = "" if len(names) == 1 else f"{slug(place, name)}/"
        optimized = _optimized(model, tables[name], images[0], num_optimized, ascent)
        LayerPages(site, folder, shown, found[name], optimized).write(show_progress)
    if len(names) > 1:
        pages = [
            {"name": name, "href": f"{slug(place, name)}/index.html", "table": tables[name]}
            for place, name in enumerate(names)
        ]
        site.write("index.html", "layers.html", title=shown.title, layers=pages)
    site.finish({"title": shown.title, "layers": names})
    return site.folder / "index.html"


def _images_of(dataloader: Dataloader) -> DatasetLike:
    """The data set of a loader, whose image i is image i of the loader's order."""
    dataset: DatasetLike | None = getattr(dataloader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"A {type(dataloader).__name__} has no data set whose images could be shown; pass a DataLoader, "
            "or dataset=, a sequence of the images in the loader's order."
        )
    return dataset


def _labels(given: Mapping[int, str] | AnyPath | None) -> dict[int, str]:
    """Text by filter."""
    if given is None or isinstance(given, Mapping):
        rows = [(str(key), str(text)) for key, text in (given or {}).items()]
    else:
        lines = csv.reader(read_text(given).splitlines())
        rows = [(line[0], ", ".join(line[1:])) for line in lines if any(map(str.strip, line))]
        if rows and not rows[0][0].strip().isdecimal():  # a heading
            rows = rows[1:]
    wrong = [key for key, _ in rows if not key.strip().isdecimal()]
    if wrong:
        raise ValueError(
            f"filter_labels have {wrong[0]!r} where a filter's number should be; expected rows of filter "
            "and text."
        )
    return {int(key): text.strip() for key, text in rows if text.strip()}


def _check_labels(labels: Mapping[int, str], layer: str, num_filters: int) -> None:
    beyond = [key for key in labels if key >= num_filters]
    if beyond:
        raise ValueError(
            f"filter_labels name filter {beyond[0]}; {layer!r} has filters 0 to {num_filters - 1}."
        )


def _optimized(
    model: nn.Module,
    table: ClassFilters,
    image: Tensor,
    number: int,
    options: Keywords,
) -> dict[int, Optimized]:
    """Optimized images of the filters that most classes select, or that score highest of these."""
    if not number:
        return {}
    users, best = table.selected.sum(0), table.scores.nan_to_num(nan=-math.inf).amax(0)
    order = sorted(range(table.num_filters), key=lambda k: (-int(users[k]), -float(best[k]), k))
    chosen = order[:number]
    channels, height, width = image.shape
    objectives = [FeatureObjective.of_filter(table.layer, index) for index in chosen]
    seen = visualize_features(model, objectives, (channels, height, width), **options)
    return {
        index: Optimized(seen.images[place], float(seen.values[place]), bool(seen.optimized[place]))
        for place, index in enumerate(chosen)
    }
