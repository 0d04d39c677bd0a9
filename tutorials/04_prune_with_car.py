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
# # Prune with classification accuracy reduction
#
# How important is a filter? Abbasi-Asl and Yu answer with an experiment: take it away and see how
# much accuracy goes with it. That number is the filter's *classification accuracy reduction* (CAR).
# This tutorial measures it, class by class, removes filters by it, compares the result with other
# ways to choose, and ends with networks that are really smaller.

# %%
import torch

from captum_classfilters import LayerFilterAblation, LayerFilterContribution, prune_filters
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.pruning import (
    GreedyFilterPruning,
    LayerwiseFineTuning,
    accuracy_after_removal,
    class_interpretation,
    compare_networks,
    filter_importance_baselines,
    prunable_layers,
    removal_order,
    specialize,
)
from captum_classfilters.visualize import plot_class_bars, plot_filter_grid, plot_removal_curves

_ = torch.manual_seed(0)

# %% [markdown]
# ## A network, images to choose by, and images to report on
#
# Whoever chooses and reports on the same images reports luck. Half of the test images choose the
# filters, the other half are only looked at afterwards.

# %%
digits = load_digits()
model = train_classifier(small_cnn(), digits.train, epochs=15, show_progress=False)
x, y = digits.test_images, digits.test_labels
half = len(x) // 2
choose = list(zip(x[:half].split(180), y[:half].split(180), strict=True))
report = list(zip(x[half:].split(180), y[half:].split(180), strict=True))

# %% [markdown]
# ## What a filter is worth, to whom
#
# `metric="accuracy"` asks the ablation method for CAR. The part of the network up to the layer runs
# once for each batch; what follows is replayed without each filter. Each number comes with an exact
# binomial interval, and the mean over classes, weighted by their images, is the CAR of all.

# %%
car = LayerFilterAblation(model, "second").identify(choose, metric="accuracy", show_progress=False)
best = int(car.reduction.argmax())
low, high = car.interval()[best].tolist()
print(f"filter {best}: CAR {car.reduction[best]:.3f}, between {low:.3f} and {high:.3f}")
print(f"{int((car.reduction <= 0).sum())} of {len(car.reduction)} filters cost no accuracy at all")

# %%
told = class_interpretation(car, num_classes=3)
strongest = car.reduction.argsort(descending=True)[:3].tolist()
figure, _ = plot_class_bars([told[one] for one in strongest])

# %% [markdown]
# Whiskers that cross zero say that these images do not show an effect: with about 36 images of a
# class, one image more or less is nearly three per cent.
#
# ## Remove the least important, again and again
#
# Filters stand in for each other, so a ranking made once goes wrong: `GreedyFilterPruning` measures
# anew after each removal. It masks filters, so the model stays as it is.

# %%
layer = "second"
greedy = GreedyFilterPruning(model, layer).run(choose, report, num_filters=1, show_progress=False)
print("first to go:", greedy.order[:8])
print(f"accuracy with half the filters: {greedy.report_accuracy[16]:.3f}")
print(f"accuracy with all: {greedy.report_accuracy[0]:.3f}")

# %% [markdown]
# ## Is it better than cheaper ways?
#
# The same masks and the same images for every order of removal; ten random orders are the control.

# %%
scores = filter_importance_baselines(model, layer, choose, show_progress=False)
orders = {
    "CAR, greedy": greedy,
    "CAR, one-shot": removal_order(car.reduction + 1e-6 * car.loss_increase),
    **{name: removal_order(values) for name, values in scores.items()},
}
curves = accuracy_after_removal(model, layer, orders, report, show_progress=False)
print(curves.table((0.25, 0.5, 0.75)))
figure, _ = plot_removal_curves(curves)

# %% [markdown]
# ## Train a little after each removal
#
# What is left can learn to do without. A few steps are enough, the layer and its reader each at a
# learning rate of their own. Training works on a copy; `state_path=` would let a killed run go on.

# %%
tuning = LayerwiseFineTuning(digits.train, {layer: 0.005, "filters": 0.02}, num_steps=10)
tuned = GreedyFilterPruning(model, layer).run(
    choose, report, num_filters=8, fine_tune=tuning, fine_tune_every=4, show_progress=False
)
print("filters left   without training   with training")
for removed in (16, 20, 24):
    without, trained = greedy.report_accuracy[removed], tuned.report_accuracy[removed]
    print(f"{32 - removed:12}   {without:16.3f}   {trained:13.3f}")

# %% [markdown]
# ## Which filters went first
#
# The first layer's filters have pictures of their own. Here all filters of both inner layers compete:
# in each step the cheapest filter of any layer goes.

# %%
both = GreedyFilterPruning(model, ["first", "second"]).run(
    choose, report, num_filters=24, schedule="all_layers", show_progress=False
)
for name, mask in both.masks().items():
    print(f"{name}: {int(mask.sum())} of {len(mask)} filters left")
print(f"accuracy on the images to report on: {both.report_accuracy[-1]:.3f}")
figure, _ = plot_filter_grid(model.first[0].weight.detach(), both.order_of("first"))

# %% [markdown]
# ## Make the network smaller
#
# A mask saves nothing. `prune_filters` removes the filters, their normalization and what later layers
# read of them, and checks that the smaller network puts out what the masked one does.

# %%
small = prune_filters(model, both, x[:8])
comparison = compare_networks(model, small, x[:64])
print(comparison)

# %% [markdown]
# Layers that a residual sum ties together cannot be pruned by themselves; `prunable_layers` says which
# can, and `prune_filters` names the partners of one that cannot.

# %%
print(prunable_layers(model, x[:2]))

# %% [markdown]
# ## A specialist for some classes
#
# With a table of class filters the question can be turned around: which filters do 3, 5 and 8 need?
# The specialist keeps those, and three outputs.

# %%
table = LayerFilterContribution(model, "filters").identify(
    digits.train, num_filters=8, show_progress=False
)
specialist = specialize(model, table, [3, 5, 8], x[:8], dataloader=report, show_progress=False)
print(specialist.accuracy)
