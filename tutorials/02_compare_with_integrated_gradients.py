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
# # Compare with Integrated Gradients
#
# Integrated Gradients says which *pixels* made a prediction, class filters say which *filters* did.
# There are two honest ways to compare them, and this tutorial goes both:
#
# 1. **In the image's space**, `ClassFilterSaliency` explains pixels through the class's filters,
#    beside `IntegratedGradients` and other methods of Captum's.
# 2. **In gate space**, `FilterGate` turns filters into inputs, and Captum's own
#    `IntegratedGradients` explains *them*, beside `LayerFilterContribution`.
#
# `compare_attributions` measures both, each in a table of its own.
#
# Scores from different spaces are not comparable with each other: an infidelity over 64 pixels and
# one over 64 filters measure different perturbations.

# %%
import time

import torch
from captum.attr import (
    FeatureAblation,
    IntegratedGradients,
    LayerConductance,
    LayerGradCam,
    NoiseTunnel,
    Occlusion,
    Saliency,
)

from captum_classfilters import (
    ClassFilterSaliency,
    FilterGate,
    LayerFilterContribution,
    LayerFilterFrequency,
)
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.identify import confusion_filters, contrast_classes
from captum_classfilters.metrics import (
    cascading_randomization,
    class_curves,
    collateral_damage,
    compare_attributions,
    compare_methods,
    filter_curves,
)
from captum_classfilters.visualize import (
    plot_comparison,
    plot_filter_contrast,
    plot_method_comparison,
)

_ = torch.manual_seed(0)

# %% [markdown]
# ## A network and its class filters

# %%
digits = load_digits()
model = train_classifier(small_cnn(), digits.train, epochs=15, show_progress=False)
layer = "filters"
contribution = LayerFilterContribution(model, layer)
class_filters = contribution.identify(digits.train, num_filters=5, show_progress=False)

x, y = digits.test_images[:100], digits.test_labels[:100]

# %% [markdown]
# ## In the image's space
#
# `ClassFilterSaliency` lets the gradient flow back through the five filters of the target's class
# and through nothing else. With `n_steps` it is averaged along the path from a black image, as in
# Integrated Gradients; with *all* filters selected the two are the same numbers.

# %%
integrated_gradients = IntegratedGradients(model)
saliency = ClassFilterSaliency(model, layer, class_filters)
everything = ClassFilterSaliency(model, layer, class_filters.select(num_filters=64))

same = torch.allclose(
    everything.attribute(x, target=y, n_steps=50),
    integrated_gradients.attribute(x, target=y, n_steps=50).float(),
    atol=1e-5,
)
print("all filters selected, equal to Integrated Gradients:", same)

# %% [markdown]
# ## Side by side
#
# Any of Captum's methods and of ours, on the same images and targets. What scores pixels and what
# scores filters is told apart by itself.

# %%
comparison = compare_attributions(
    model,
    {
        "Saliency": Saliency(model),
        "Integrated Gradients, 50 steps": integrated_gradients,
        "Occlusion 2x2": (Occlusion(model), {"sliding_window_shapes": (1, 2, 2)}),
        "Grad-CAM": LayerGradCam(model, model.filters),
        "class filters, one gradient": saliency,
        "class filters, 50 steps": (saliency, {"n_steps": 50}),
        "class filter maps": ClassFilterSaliency(
            model, layer, class_filters, mode="activation_map"
        ),
        "contribution": contribution,
        "frequency": LayerFilterFrequency(model, layer),
        "Layer Conductance": (LayerConductance(model, model.filters), {"n_steps": 20}),
        "Integrated Gradients of gates": IntegratedGradients(FilterGate(model, layer)),
    },
    x,
    y,
    show_progress=False,
)
print(comparison)

# %% [markdown]
# **Infidelity** asks how well scores predict the logit's change when random features go, the
# scale-invariant form after the best factor for each image; **max-sensitivity** how much an
# explanation moves when the image moves a little; **deletion** how soon the probability falls as the
# best features go, **insertion** how soon it rises as they come. Lower is better but for insertion.
# `random` knows nothing: what does not do better says nothing either. The two tables do not compare:
# one is about 64 pixels, the other about 64 filters. These are figures of one small network: measure
# on your own.

# %%
figure, _ = plot_comparison(comparison, images=3)

# %% [markdown]
# The tables are there as data frames too, with the ends of each interval:

# %%
columns = ["deletion_area", "deletion_area_low", "deletion_area_high"]
print(comparison.filters[layer].to_pandas()[columns].round(3).to_string())

# %% [markdown]
# Captum's `NoiseTunnel` takes the method as it is:

# %%
smooth = NoiseTunnel(saliency).attribute(x[:4], target=y[:4], nt_samples=8, stdevs=0.1)
print(smooth.shape)

# %% [markdown]
# ## In gate space
#
# The gates of the 64 filters are the inputs now, all ones; the images are an additional argument.
# Captum's methods need no change.

# %%
gate = FilterGate(model, layer)
gates = gate.ones(len(x))
options = {"target": y, "additional_forward_args": x}

by_integration = IntegratedGradients(gate).attribute(gates, n_steps=20, **options)
by_ablation = FeatureAblation(gate).attribute(gates, **options)
exact = contribution.filter_scores(contribution.attribute(x, target=y))
print("largest difference to Integrated Gradients:", float((exact - by_integration).abs().max()))
print("largest difference to ablation:            ", float((exact - by_ablation).abs().max()))

# %% [markdown]
# All three agree, because the rest of the network is linear in the filters: an average and a
# linear layer. The closed form costs one forward pass; that is why its infidelity above is nothing
# but rounding.
#
# ## Are they the right filters?
#
# An image's filters, removed in order of their contribution: random orders, the norm of the weights
# and the opposite order belong to the result.

# %%
print(filter_curves(model, layer, x, exact, target=y))

# %% [markdown]
# And a class's, over the test images: is the class lost without its first filters (necessity, low is
# good), is it recognized by them alone (sufficiency, high is good), and whom else does it hurt?

# %%
print(class_curves(model, layer, class_filters, digits.test, show_progress=False))
damage = collateral_damage(model, layer, class_filters, digits.test, show_progress=False)
print(damage)
for removed, true, seen, change in damage.largest(3):
    print(f"without {removed}'s filters {change:+.0%} of the {true}s are taken for {seen}")

# %% [markdown]
# Last, the sanity check: with weights drawn anew from the output down, the explanation must change.

# %%
print(
    cascading_randomization(
        model, lambda net: LayerFilterContribution(net, layer), x[:30], target=y[:30]
    )
)

# %% [markdown]
# ## More than chance?
#
# A table of 10 classes and 64 filters has 640 cells, and the largest of many random numbers is large.
# Permuted labels give every cell a p-value, and a q-value that allows for the number of cells:

# %%
table = contribution.identify(digits.train, significance=True, show_progress=False)
discoveries = table.select(fdr=0.05)
print("discoveries for each class:", discoveries.selected.sum(1).tolist())
among_best = discoveries.selected & class_filters.selected
print("of the five best filters:  ", among_best.sum(1).tolist())

# %% [markdown]
# ## Would another method have found the same filters?
#
# Agreement beside its chance level, what five filters of each class are worth alone, and the cost of
# finding them, on one layer:

# %%
methods = compare_methods(model, layer, digits.train, digits.test, show_progress=False)
print(methods)

# %%
figure, _ = plot_method_comparison(methods)

# %% [markdown]
# ## Why a 3 and not an 8?
#
# The same evidence, asked as a contrast: which filters tell two classes apart, and which drive the
# most frequent error?

# %%
contrast = contrast_classes(contribution, digits.test, 3, 8, show_progress=False)
figure, _ = plot_filter_contrast(contrast)

# %%
errors = confusion_filters(contribution, digits.test, show_progress=False)
true, predicted = errors.largest()[0]
cell = errors.cell(true, predicted)
print(f"images of {cell.against} taken for {cell.favored}:", cell.num_images)
print("driven by the filters", cell.strongest(3).tolist())

# %% [markdown]
# ## What they cost

# %%
timings = {}
for name, explain in {
    "LayerFilterContribution": lambda: contribution.attribute(x, target=y),
    "FeatureAblation over gates": lambda: FeatureAblation(gate).attribute(gates, **options),
    "IntegratedGradients over pixels": lambda: integrated_gradients.attribute(x, target=y),
}.items():
    started = time.perf_counter()
    explain()
    timings[name] = time.perf_counter() - started
for name, seconds in timings.items():
    ratio = seconds / timings["LayerFilterContribution"]
    print(f"{name:32s} {1000 * seconds:7.1f} ms  {ratio:6.1f}x")
