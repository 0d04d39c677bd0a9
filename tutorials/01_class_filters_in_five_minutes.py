# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Class filters in five minutes
#
# A convolutional network has a few dozen to a few thousand filters. Which of them decide that an
# image shows a *three*? This tutorial trains a small network on handwritten digits (1,797 real
# scans of 8×8 pixels that come with scikit-learn), finds the filters of each class, keeps nothing
# but those, and looks at what they look at. It runs on a laptop's CPU in well under a minute.

# %%
import torch

from captum_classfilters import (
    ClassFilterSaliency,
    LayerFilterContribution,
    LayerFilterFrequency,
    accuracy_curve,
    decompose,
    identify_class_filters,
    refit_head,
)
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.visualize import (
    plot_accuracy_curve,
    plot_class_filters,
    plot_explanations,
    plot_filter_maps,
)

_ = torch.manual_seed(0)

# %% [markdown]
# ## Data and a network
#
# Three convolutions, an average over positions, one linear layer. Filters are *ranked* on the
# training images and everything is *scored* on the test images.

# %%
digits = load_digits()
model = train_classifier(small_cnn(), digits.train, epochs=15, show_progress=False)
print(model)


def accuracy(network: torch.nn.Module) -> float:
    return evaluate_classifier(network, digits.test, show_progress=False).accuracy


print(f"test accuracy {accuracy(model):.3f}")

# %% [markdown]
# ## Which filters decide each class?
#
# Two methods, one pass over the training images:
#
# - `LayerFilterFrequency`: how often is a filter among the strongest of the class's images
#   (Badola et al., *Decomposing the Deep*)?
# - `LayerFilterContribution`: how much does it add to the class's logit? After an average pool and a
#   linear layer this is exact: the contributions of an image add up to its logit minus the bias.

# %%
tables = identify_class_filters(
    {
        "frequency": LayerFilterFrequency(model, "filters", top_k=5),
        "contribution": LayerFilterContribution(model, "filters"),
    },
    digits.train,
    num_filters=5,
    show_progress=False,
)
contribution = tables["contribution"]
print(contribution)
print("filters of a three:", contribution.filters_of(3).tolist())
print("classes of the first of these:", contribution.classes_of(int(contribution.filters_of(3)[0])))

# %%
figure, _ = plot_class_filters(contribution)

# %% [markdown]
# The two methods need not agree. `agreement` says how far they do, and how far random sets would:

# %%
agreement = tables["frequency"].agreement(contribution)
print(f"overlap {agreement.mean_overlap:.2f}, by chance {agreement.mean_chance:.2f}")

# %% [markdown]
# ## Do they suffice?
#
# `decompose` gives a copy of the network in which each class's logit sees its own five filters and
# nothing else: 60 numbers in the head instead of 650. `refit_head` trains these on the training
# images; nothing before the head changes.

# %%
decomposed = decompose(model, contribution)
print(decomposed[-1])
before = accuracy(decomposed)
refit_head(decomposed, digits.train, show_progress=False)
print(
    f"full {accuracy(model):.3f}, five filters per class {before:.3f}, refitted {accuracy(decomposed):.3f}"
)

# %% [markdown]
# How many are enough? The curve shows both rules beside random filters:

# %%
curve = accuracy_curve(
    model,
    tables,
    digits.test,
    num_filters=(1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64),
    show_progress=False,
)
figure, _ = plot_accuracy_curve(curve)

# %% [markdown]
# ## Where do they look?
#
# `ClassFilterSaliency` explains an image through the class's filters alone, in the image's shape, so
# that all of Captum's tools take it: as a gradient that flows through these filters alone, or as a
# map of their contributions (here of 4×4 positions, hence coarse).

# %%
chosen = [int((digits.test_labels == digit).nonzero()[0]) for digit in (0, 3, 7)]
images, labels = digits.test_images[chosen], digits.test_labels[chosen]
saliency = ClassFilterSaliency(model, "filters", contribution)
maps = ClassFilterSaliency(model, "filters", contribution, mode="activation_map")
figure, _ = plot_explanations(
    images,
    {
        "through class filters": saliency.attribute(images, target=labels, n_steps=50),
        "class filter maps": maps.attribute(images, target=labels),
    },
    titles=[f"a {digit}" for digit in labels.tolist()],
)

# %% [markdown]
# Filter by filter, with what each adds to the logit of *three*:

# %%
attributions = LayerFilterContribution(model, "filters").attribute(images, target=labels)
figure, _ = plot_filter_maps(images[1], attributions[1], contribution, 3, title="a 3")

# %% [markdown]
# ## Keep the result
#
# One file, safetensors with JSON in its header, with where it came from:

# %%
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

from captum_classfilters import ClassFilters  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.safetensors"
    contribution.save(path)
    print(ClassFilters.load(path) == contribution)

# %% [markdown]
# **Next:** [compare with Integrated Gradients](02_compare_with_integrated_gradients).
