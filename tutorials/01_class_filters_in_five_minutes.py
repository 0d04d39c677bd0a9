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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import (
    ClassFilterSaliency,
    LayerFilterContribution,
    LayerFilterFrequency,
    accuracy_curve,
    decompose,
    identify_class_filters,
    refit_head,
)
from captum_classfilters.visualize import (
    plot_accuracy_curve,
    plot_class_filters,
    plot_explanations,
)

_ = torch.manual_seed(0)

# %% [markdown]
# ## Data and a network
#
# Two convolutions, an average over positions, one linear layer. Filters are *ranked* on the
# training images and everything is *scored* on the test images.

# %%
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
train_x, test_x, train_y, test_y = train_test_split(
    images, labels, test_size=0.4, random_state=0, stratify=labels
)
train = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
test = DataLoader(TensorDataset(test_x, test_y), batch_size=256)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 48, 3, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(48, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _epoch in range(25):
    for x, y in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
model.eval()


def accuracy(network: nn.Module) -> float:
    with torch.no_grad():
        return float((network(test_x).argmax(1) == test_y).float().mean())


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
layer = model[3]  # the second ReLU: 48 filters
tables = identify_class_filters(
    {
        "frequency": LayerFilterFrequency(model, layer, top_k=5),
        "contribution": LayerFilterContribution(model, layer),
    },
    train,
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
# nothing else: 60 numbers in the head instead of 490. `refit_head` trains these on the training
# images; nothing before the head changes.

# %%
decomposed = decompose(model, contribution)
print(decomposed[-1])
before = accuracy(decomposed)
refit_head(decomposed, train, show_progress=False)
print(
    f"full {accuracy(model):.3f}, five filters a class {before:.3f}, refitted {accuracy(decomposed):.3f}"
)

# %% [markdown]
# How many are enough? The curve shows both rules beside random filters:

# %%
curve = accuracy_curve(
    model, tables, test, num_filters=(1, 2, 3, 5, 8, 12, 16, 24, 32, 48), show_progress=False
)
figure, _ = plot_accuracy_curve(curve)

# %% [markdown]
# ## Where do they look?
#
# `ClassFilterSaliency` explains an image through the class's filters alone, in the image's shape, so
# that all of Captum's tools take it. As a map of the filters' contributions:

# %%
chosen = [int((test_y == digit).nonzero()[0]) for digit in (0, 3, 7)]
saliency = ClassFilterSaliency(model, layer, contribution, mode="activation_map")
maps = saliency.attribute(test_x[chosen], target=test_y[chosen])
figure, _ = plot_explanations(
    test_x[chosen],
    {"class filters": maps},
    titles=[f"a {digit}" for digit in test_y[chosen].tolist()],
)

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
