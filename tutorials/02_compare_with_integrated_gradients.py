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
# 1. **In the image's space**, `ClassFilterSaliency` explains pixels through the class's filters, and
#    Captum's `infidelity` and `sensitivity_max` judge it beside `IntegratedGradients`.
# 2. **In gate space**, `FilterGate` turns filters into inputs, and Captum's own
#    `IntegratedGradients` explains *them*, beside `LayerFilterContribution`.
#
# Scores from different spaces are not comparable with each other: an infidelity over 64 pixels and
# one over 64 filters measure different perturbations.

# %%
import time

import torch
from captum.attr import FeatureAblation, IntegratedGradients, NoiseTunnel
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max

from captum_classfilters import (
    ClassFilterSaliency,
    FilterGate,
    LayerFilterContribution,
)
from captum_classfilters.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.visualize import plot_explanations

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


# %%
@infidelity_perturb_func_decorator(True)
def drop_pixels(inputs: torch.Tensor, _baselines: object = None) -> torch.Tensor:
    """Set a random fifth of the pixels to black."""
    return inputs * (torch.rand_like(inputs) > 0.2)


def judge(name: str, explain, **options) -> None:
    started = time.perf_counter()
    attributions = explain(x, target=y, **options).detach()
    seconds = time.perf_counter() - started
    torch.manual_seed(0)
    unfaithful = infidelity(
        model, drop_pixels, x, attributions.float(), target=y, n_perturb_samples=20, normalize=True
    )
    torch.manual_seed(0)
    sensitive = sensitivity_max(explain, x, target=y, **options)
    print(
        f"{name:38s} infidelity {unfaithful.mean():7.4f}  max-sensitivity {sensitive.mean():6.3f}"
        f"  {1000 * seconds:7.1f} ms"
    )


judge("Integrated Gradients, 50 steps", integrated_gradients.attribute, n_steps=50)
judge("class filters (5 of 64), 50 steps", saliency.attribute, n_steps=50)
judge("class filters (5 of 64), one gradient", saliency.attribute)

# %% [markdown]
# Infidelity asks how well pixel scores predict the logit's change when a fifth of the pixels go
# black, max-sensitivity how much an explanation moves when the image moves a little; lower is better
# for both. The scale-invariant form of infidelity (`normalize=True`) is used because five filters
# carry only part of the logit. These are figures of one small network: measure on your own.

# %%
shown = [int((y == digit).nonzero()[0]) for digit in (0, 3, 7)]
maps = ClassFilterSaliency(model, layer, class_filters, mode="activation_map")
figure, _ = plot_explanations(
    x[shown],
    {
        "Integrated Gradients": integrated_gradients.attribute(x[shown], target=y[shown]),
        "through class filters": saliency.attribute(x[shown], target=y[shown], n_steps=50),
        "class filter maps": maps.attribute(x[shown], target=y[shown]),
    },
    titles=[f"a {digit}" for digit in y[shown].tolist()],
)

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
# linear layer. The closed form costs one forward pass.
#
# How faithful are the filter scores? Infidelity drops random sets of filters and compares the
# logit's change with the sum of their scores. Exact contributions leave nothing, random scores do:


# %%
@infidelity_perturb_func_decorator(True)
def drop_filters(gates: torch.Tensor, _baselines: object = None) -> torch.Tensor:
    """Close a random half of the gates."""
    return gates * (torch.rand_like(gates) > 0.5)


candidates = {"exact contributions": exact, "random scores": torch.randn_like(exact) * exact.std()}
for name, scores in candidates.items():
    unfaithful = infidelity(gate, drop_filters, gates, scores, n_perturb_samples=20, **options)
    print(f"{name:20s} {unfaithful.mean():.2e}")

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
