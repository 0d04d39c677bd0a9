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
# # Decompose the head
#
# Badola et al. give every class its own few filters: the head of a trained network falls apart into
# small classifiers, one for each class, that can be read, tested and removed one by one. This
# tutorial goes that way from the choice of filters to a file that runs elsewhere.

# %%
import tempfile
from pathlib import Path

import torch

from captum_classfilters import (
    LayerFilterContribution,
    accuracy_curve,
    decompose,
    fine_tune,
    prune_filters,
    refit_head,
    select_by_accuracy,
)
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.heads import compare_heads, model_essentiality, remove_class
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.visualize import plot_accuracy_curve

_ = torch.manual_seed(0)

# %% [markdown]
# ## A network, and three sets of images
#
# Training images rank the filters, a third of the test images choose how many, the others report.

# %%
digits = load_digits()
model = train_classifier(small_cnn(), digits.train, epochs=15, show_progress=False)
x, y = digits.test_images, digits.test_labels
third = len(x) // 3
choose = list(zip(x[:third].split(64), y[:third].split(64), strict=True))
report = list(zip(x[third:].split(64), y[third:].split(64), strict=True))


def accuracy(network: torch.nn.Module) -> float:
    return evaluate_classifier(network, report, show_progress=False).accuracy


print(f"full network {accuracy(model):.3f}")

# %% [markdown]
# ## How many filters does a class need?
#
# One pass ranks the filters of every class by what they add to its logit. The curve measures any
# number of them, with random filters as a control.

# %%
ranking = LayerFilterContribution(model, "filters").identify(
    digits.train, num_filters=5, show_progress=False
)
curve = accuracy_curve(
    model,
    ranking,
    choose,
    num_filters=(1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64),
    show_progress=False,
)
figure, _ = plot_accuracy_curve(curve)

# %% [markdown]
# The smallest number that keeps 98 % of the accuracy, on the images set aside to choose:

# %%
table = select_by_accuracy(model, ranking, choose, keep=0.98, show_progress=False)
print("filters of each class:", [len(table.filters_of(digit)) for digit in range(10)])

# %% [markdown]
# ## Are they necessary, are they sufficient?
#
# A class's images are classified by the *full* network with noise in place of its own filters, and
# with noise in place of all the others. If the filters are the class's, the first recall is low and
# the second high; random sets of the same size say what to compare with. Noise is a hard test: it
# drives filters of other classes, too.

# %%
tested = model_essentiality(model, table, report, show_progress=False)
for name, recall in {
    "as it is": tested.clean,
    "noise in its own filters": tested.at_set,
    "noise in as many others": tested.random_at_set,
    "noise in all but its own": tested.at_complement,
    "noise in all but as many others": tested.random_at_complement,
}.items():
    print(f"{name:33s}{float(recall.nanmean()):.3f}")

# %% [markdown]
# ## The decomposed network
#
# `decompose` copies the model and gives the copy a head in which each class sees its own filters
# only. Without any training it loses some accuracy. Refitting solves for the remaining weights, in
# a second and without touching the backbone. Fine-tuning trains everything and keeps the state that
# does best on the images that choose; where refitting does as well, as here, it is not needed.

# %%
decomposed = decompose(model, table)
print(decomposed[-1])
as_it_is = accuracy(decomposed)

refitted = decompose(model, table)
refit_head(refitted, digits.train, show_progress=False)

tuned = decompose(model, table)
fine_tune(
    tuned,
    digits.train,
    choose,
    epochs=3,
    learning_rate=1e-3,
    show_progress=False,
)
for name, value in {
    "full": accuracy(model),
    "decomposed": as_it_is,
    "refitted": accuracy(refitted),
    "fine-tuned": accuracy(tuned),
}.items():
    print(f"{name:12s}{value:.3f}")

# %% [markdown]
# Which classes pay for it? Recall of each, before and after:

# %%
before = evaluate_classifier(model, report, show_progress=False).recall
after = evaluate_classifier(refitted, report, show_progress=False).recall
for digit in range(10):
    print(f"{digit}: {before[digit]:.3f} -> {after[digit]:.3f}")

# %% [markdown]
# ## What it saves
#
# The head keeps a value for each filter of each class. The convolutions before it are as large as
# ever, which is why the network as a whole hardly shrinks. Filters that *no* class needs can go for
# good, with everything that fed them.

# %%
print(compare_heads(model, refitted, x[:8], repetitions=5))

# %%
unused = (~table.selected.any(0)).nonzero()[:, 0]
print(f"{len(unused)} of {table.num_filters} filters serve no class")
if len(unused):
    smaller = prune_filters(model, "filters.0", x[:8], remove=unused)
    print(f"without them {accuracy(smaller):.3f}")

# %% [markdown]
# ## A class leaves
#
# In a dense head, taking a class away leaves every filter in use. Here the others' logits do not
# change, and the filters that it alone used are free.

# %%
without_three = remove_class(refitted[-1], 3)
print("only used by threes:", without_three.unused_features.tolist())

# %% [markdown]
# ## Elsewhere
#
# The decomposed network is an ordinary module: `state_dict`, pickle, TorchScript, `torch.export`,
# ONNX. `to_dense()` turns the head back into a linear layer with zeros.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "decomposed.pt2"
    torch.export.save(torch.export.export(refitted.eval(), (x[:8],)), path)
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        print(
            "largest difference after loading:",
            float((loaded(x[:8]) - refitted(x[:8])).abs().max()),
        )
