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
# # From a shortcut to its repair
#
# A network learns digits, and nearly every *three* that it learns from has a white patch in a corner:
# a scanner's mark, say. On such data its accuracy is fine. This tutorial finds the filters that carry
# the patch, edits the head so that they stop to, and judges the edits on other images, beside random
# edits and beside a network that never saw the patch. Nothing is trained again.

# %%
import torch
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters import LayerFilterContribution
from captum_classfilters.answers import find_shortcuts, repair, repair_confusion
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.identify import confusion_filters
from captum_classfilters.visualize import plot_confusion_repair, plot_shortcuts

THREE = 3
quiet = {"show_progress": False}

# %% [markdown]
# ## Two networks
#
# One learns from threes of which 95 per cent have the patch, the other from the same images without it.


# %%
def stamp(images):
    """The same images with a white patch of 2 x 2 pixels in a corner."""
    images = images.clone()
    images[:, :, :2, :2] = 1
    return images


def train(images, labels):
    torch.manual_seed(0)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(images, labels), 64, shuffle=True, generator=order)
    return train_classifier(small_cnn(), loader, epochs=15, show_progress=False)


digits = load_digits()
x, y = digits.train.dataset.tensors
has_patch = (y == THREE) & (torch.rand(len(y), generator=torch.Generator().manual_seed(0)) < 0.95)
with_patch = torch.where(has_patch[:, None, None, None], stamp(x), x)
model, twin = train(with_patch, y), train(x, y)

# %% [markdown]
# Half of the test images serve to find what carries the patch, the other half to judge.

# %%
find = [(digits.test_images[:360], digits.test_labels[:360])]
judge = [(digits.test_images[360:], digits.test_labels[360:])]


def told(network):
    """Accuracy on the images to judge on, without and with the patch, and of the threes without it."""
    ((images, labels),) = judge
    right = [network(shown).argmax(1) == labels for shown in (images, stamp(images))]
    three = labels == THREE
    shares = (right[0].float().mean(), right[1].float().mean(), right[0][three].float().mean())
    return "".join(f"{float(share):10.3f}" for share in shares)


print(f"{'':24s}   without      with    threes")
print(f"{'learned with the patch':24s}{told(model)}")
print(f"{'learned without it':24s}{told(twin)}")

# %% [markdown]
# With the patch on any image the first network makes mistakes, and the second hardly does.
#
# ## Which filters carry it?
#
# The same images without and with it. A function that adds it is enough; two loaders, or a loader of
# pairs, do as well.

# %%
found = find_shortcuts(model, find, stamp, permutations=4999, **quiet)
print(found)
figure, _ = plot_shortcuts(found)

# %% [markdown]
# Asked of the network that never saw the patch, the same question finds nothing:

# %%
print(find_shortcuts(twin, find, stamp, permutations=4999, **quiet))

# %% [markdown]
# ## And without pairs?
#
# Often there are images with it and *other* images without it. They are compared within classes.

# %%
images, labels = find[0]
half = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) < 0.5
without = [(images[half], labels[half])]
marked = [(stamp(images[~half]), labels[~half])]
groups = find_shortcuts(model, without, marked, paired=False, permutations=4999, **quiet)
print(groups)
shared = set(groups.filters.tolist()) & set(found.filters.tolist())
print(f"{len(shared)} of {len(groups.filters)} filters were found with pairs too")

# %% [markdown]
# ## Repair
#
# Each edit is another weight and bias for the last layer, in a copy of the model. As many weights,
# filters or directions drawn at random stand beside it: what they do as well was no repair.

# %%
edits = {"weights": 10, "filters": 10, "directions": 1}
repairs = {
    edit: repair(model, found, judge, stamp, edit=edit, size=size, outputs=[THREE], **quiet)
    for edit, size in edits.items()
}
print(repairs["filters"])
figure, _ = plot_shortcuts(repairs["filters"])

# %%
print(f"{'':24s}   without      with    threes    random, with")
print(f"{'learned with the patch':24s}{told(model)}")
for edit, repaired in repairs.items():
    random = float(repaired.accuracy[1, 2:].mean())
    print(f"{repaired.size:3d} {edit:20s}{told(repaired.model)}{random:16.3f}")
print(f"{'learned without it':24s}{told(twin)}")

# %% [markdown]
# Ten weights, or ten filters, bring the accuracy with the patch to that of the network that never saw
# it; ten filters at random change nothing. As many weights of the same row at random help as well, though
# less: this output is simply too strong.
#
# **What does not work.** The threes themselves pay. In training a three was told by its patch, so that
# what carries the patch also speaks for threes without it, and each edit loses some of them. The direction
# of the patch is the extreme: taken out of the features it leaves no three at all. None of the edits
# brings threes back to what the twin has of them. Look at the class that has the shortcut, not at accuracy
# alone, before an edit is kept.
#
# ## A cell of the confusion matrix
#
# Now nobody knows of the patch. All that is seen is that, of some images, too many of one digit are
# taken for another. Half of the images have the patch here:


# %%
def half_stamped(batches):
    """Every second image with the patch."""
    ((images, labels),) = batches
    odd = (torch.arange(len(labels)) % 2 == 1)[:, None, None, None]
    return [(torch.where(odd, stamp(images), images), labels)]


method = LayerFilterContribution(model, "filters")
errors = confusion_filters(method, half_stamped(find), **quiet)
true, predicted = errors.largest()[0]
fixed = repair_confusion(model, half_stamped(find), half_stamped(judge), true, predicted, **quiet)
print(fixed)
figure, _ = plot_confusion_repair(fixed)

# %% [markdown]
# The edit helps, and so does the plain remedy, a lower bias of the predicted class: where one output is too
# strong a single number does, and no filter is to blame. The interval of the cell itself, of few images,
# holds zero; what is won on all images is beyond chance.
