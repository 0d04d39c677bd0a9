"""Images of the user's folder explained: where their class's filters look, and what each filter adds."""

from collections.abc import Callable

import torch

from captum_classfilters._core.tables import text_table
from captum_classfilters.atlas.pictures import ShownImages, write_explained
from captum_classfilters.attr import LayerFilterContribution
from captum_classfilters.cli.folder_classes import answers_of
from captum_classfilters.cli.folder_job import (
    FolderJob,
    check_number,
    open_folder,
    write_manifest,
    write_rows,
)
from captum_classfilters.identify import identify_class_filters

_FILTERS_TOLD = 5


def run_explain(job: FolderJob, write: Callable[[str], None] = print) -> list[dict[str, object]]:
    r"""
    Explain images for the class that the model gives them, by filters found on the whole folder.

    For each image a picture beside Integrated Gradients and Grad-CAM, and what its strongest filters
    add to the answer, as CSV.

    Args:

        job (FolderJob): What to do; ``explain`` is the number of images, spread over the folder.
        write (Callable): Where the report goes.
                    Default: print

    Returns:
        *list* of rows: image, class, answer, filter and contribution.

    Raises:
        ValueError, OSError: With what was wrong, and what would be right.
    """
    check_number("explain", job.explain, least=1)
    opened = open_folder(job, write=write)
    chosen, names = opened.images, opened.class_names
    method = LayerFilterContribution(opened.model, opened.layer)
    table = identify_class_filters(
        method,
        opened.loader(chosen),
        num_filters=job.num_filters,
        class_names=names,
        show_progress=job.show_progress,
    )
    places = torch.linspace(0, len(chosen) - 1, min(job.explain, len(chosen))).round().long()
    shown = ShownImages(chosen)
    with torch.no_grad():
        inputs = shown.inputs(places.tolist()).to(job.device)
        answers = answers_of(opened.model, [inputs]).cpu()
    known = table.selected.any(1)[answers]
    if not bool(known.any()):
        raise ValueError(
            "The model takes these images for classes of which the folder has none, so that they have no "
            "class filters; add images."
        )
    places, answers = places[known], answers[known]
    scores = write_explained(
        opened.output.place,
        opened.model,
        table,
        shown,
        places.tolist(),
        answers.tolist(),
        channels_last=opened.takes_channels_last,
    )
    rows: list[dict[str, object]] = []
    for place, answer, contributions in zip(places.tolist(), answers.tolist(), scores, strict=True):
        path, label = opened.dataset.samples[chosen.indices[place]]
        label = label if opened.dataset.target_transform is None else chosen[place][1]
        order = contributions.sort(descending=True, stable=True).indices[:_FILTERS_TOLD]
        rows += [
            {
                "image": path,
                "picture": f"{place}.png",
                "class": names[label],
                "answer": names[answer],
                "filter": index,
                "contribution": float(contributions[index]),
                "selected": int(table.selected[answer, index]),
            }
            for index in order.tolist()
        ]
    write(text_table(rows))
    write_rows(opened.output.place("explanations.csv"), rows)
    table.save(opened.output.place("contribution.safetensors"), overwrite=True)
    write_manifest(opened.output, job, len(chosen))
    write(f"\nPictures, tables and manifest.json are in {opened.output.path}")
    return rows
