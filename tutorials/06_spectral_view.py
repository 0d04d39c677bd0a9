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
# # The spectral view
#
# A layer's filters are one basis of the space in which it writes. The singular value decomposition of
# its weight gives another: *singular directions*, combinations of filters sorted by how strongly the
# layer can respond along them (Praggastis et al., *The SVD of Convolutional Weights*). This tutorial
# decomposes a small network trained on scikit-learn's digits, asks random-matrix theory which
# directions training has made, and compares directions with filters as evidence for classes.

# %%
import torch

from captum_classfilters import (
    LayerFilterContribution,
    LayerSingularDirection,
    identify_class_filters,
)
from captum_classfilters.cli.demo import load_digits, small_cnn, train_classifier
from captum_classfilters.gates import masking_test
from captum_classfilters.identify import exemplars, unit_scores
from captum_classfilters.spectral import (
    compare_with_random,
    direction_signals,
    factor_layer,
    layer_svd,
    model_spectra,
    model_svd,
    select_rank,
    separation_test,
    universal_metric,
    weight_matrix,
)
from captum_classfilters.visualize import (
    FeatureObjective,
    plot_class_filters,
    plot_class_separation,
    plot_exemplars,
    plot_exponents,
    plot_features,
    plot_hypergraph,
    plot_spectrum,
    visualize_features,
)

_ = torch.manual_seed(0)

# %%
digits = load_digits()
untrained = small_cnn()
before = universal_metric(untrained)
model = train_classifier(untrained, digits.train, epochs=15, show_progress=False)
print(model)

# %% [markdown]
# ## One layer
#
# Every filter of a convolution is one row of a matrix. `layer_svd` decomposes it, with the signs
# fixed, for any stride, dilation or number of groups. What the layer puts out along a left vector is
# exactly what it would put out with the right vector, times the singular value, for a filter:
# $U^\top (y - b) = S \, \mathrm{conv}(x, V)$.

# %%
name = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)][-1]
layer = model.get_submodule(name)
svd = layer_svd(layer)
print(name, layer)
print("left", tuple(svd.left.shape), "right", tuple(svd.right.shape), "found by", svd.route)

# %%
x, y = digits.test_images, digits.test_labels
inputs = []
handle = layer.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].clone()))
signals = LayerSingularDirection(model, name).signals(x[:20])
handle.remove()
with torch.no_grad():
    from_input = svd.signals_from_input(layer, inputs[0])
print(f"largest difference {(signals - from_input).abs().max():.1e}")

# %% [markdown]
# ## Which directions has training made?
#
# The eigenvalues $S^2/d$ of a random matrix follow Marchenko and Pastur's law and end at its edge.
# Training pushes some beyond it. The law is fitted to the *bulk*, so the outliers do not stretch it.
# The tail's exponent is found by maximum likelihood, without an upper bound; the picture shows
# whether a straight line describes the tail at all.

# %%
spectra = model_spectra(model)
figure, _ = plot_spectrum(spectra[name])

# %% [markdown]
# The same layers, initialized again, are the control: no outliers, and steeper tails where there are
# enough eigenvalues to tell. The first layer has nine and the head ten: random matrices of these shapes
# have as heavy tails, so both are judged untrained whatever their exponents.

# %%
comparison = compare_with_random(model)
columns = ["alpha", "alpha of twin", "outliers", "outliers of twin", "verdict", "verdict of twin"]
print(comparison.to_pandas()[columns].round(2).to_string())
print(f"universal metric before training {before:.2f}, after {universal_metric(model):.2f}")
figure, _ = plot_exponents({"trained": comparison.model, "random twin": comparison.twin})

# %% [markdown]
# How many directions matter? There are several answers in use; they are one choice here.

# %%
matrix = weight_matrix(layer).matrices[0].detach()
rules = ["energy", "elbow", "gap", "marchenko_pastur", "gavish_donoho", "permutation"]
for rule in [*rules, "effective_rank", "stable_rank"]:
    options = {"weight": matrix} if rule == "permutation" else {}
    print(f"{rule:18s}{select_rank(svd.values, svd.shape, rule, **options):3d}")

# %% [markdown]
# Four rules that look for what noise cannot make agree on nine: with ten classes the logits span nine
# dimensions, up to a constant, and the last convolution has learned one strong direction for each.

# %% [markdown]
# ## Directions as evidence
#
# `LayerSingularDirection` is a Captum layer attribution whose features are directions. With
# `evidence="contribution"` it measures what each adds to the target's logit, which does not depend on
# the vectors' signs. `identify` makes the usual table of classes, and any plot takes it.

# %%
directions = LayerSingularDirection(model, name, evidence="contribution")
tables = identify_class_filters(
    {"filters": LayerFilterContribution(model, name), "directions": directions},
    digits.train,
    num_filters=5,
    show_progress=False,
)
figure, _ = plot_class_filters(tables["directions"])

# %% [markdown]
# ## Directions against filters
#
# `factor_layer` copies the model with the layer in two steps, to the directions and back. The copy puts
# out the same, but its directions *are* filters of a layer, so gates, ablation and every measurement
# work on them. How well is each class recognized if only its k best features are kept at this layer?

# %%
factored = factor_layer(model, name)
with torch.no_grad():
    print(f"largest difference of the logits {(factored(x) - model(x)).abs().max():.1e}")
print("k    filters  directions")
for k in (1, 2, 3, 5, 8):
    recall = [
        masking_test(
            network, table.layer, table.select(num_filters=k), digits.test, mode="keep",
            show_progress=False,
        ).own.mean()
        for network, table in ((model, tables["filters"]), (factored, tables["directions"]))
    ]  # fmt: skip
    print(f"{k:2d}    {recall[0]:.3f}    {recall[1]:.3f}")

# %% [markdown]
# ## Is the first direction special?
#
# The first direction carries the largest share of the weight's energy. Does it tell classes apart? The
# share of the variance of its mean signal that lies between classes, beside the other directions':

# %%
values = direction_signals(model, x, [name])[name]
centered = values - values.mean(0)
between = sum(
    (y == label).sum() * centered[y == label].mean(0).square() for label in y.unique()
) / centered.square().sum(0)
energy = svd.values.square() / svd.values.square().sum()
print("share of the variance between classes")
print(f"first direction, with {energy[0]:.0%} of the energy: {between[0]:.2f}")
print(f"directions 2 to 9, median: {between[1:9].median():.2f}")
print(f"the rest, median: {between[9:].median():.2f}")

# %% [markdown]
# ## What do the directions see?
#
# `exemplars` finds, in one pass, the images that drive each direction furthest up and furthest down, with
# the box of pixels on which the strongest position depends. A filter behind a ReLU has one side; a
# direction has two.

# %%
svds = model_svd(model)
seen = exemplars(model, "second.0", digits.test, directions=svds, show_progress=False)
figure, _ = plot_exemplars(seen["second.0"], digits.test.dataset, [0, 1, 2], num_images=4)

# %% [markdown]
# `visualize_features` asks the network instead of the data: it optimizes an image until it drives a
# direction as far as it can at the center of the map, up or down. The numbers say how far, on the scale
# of the sheet above: an image made for the purpose goes further than any test image.

# %%
objectives = [
    sign
    * FeatureObjective.of_direction("second.0", svds["second.0"].left[:, unit], position="center")
    for unit in range(3)
    for sign in (-1, 1)
]
optimized = visualize_features(model, objectives, (1, 8, 8), steps=128, show_progress=False)
names = [f"u{unit} {way}" for unit in range(3) for way in ("down", "up")]
figure, _ = plot_features(optimized, names)

# %% [markdown]
# ## Do classes use different directions?
#
# A hypergraph has the ten digits as vertices and directions as edges: a digit is in a direction if the
# mean share of its images' signal is at least twice an even share. The less two digits share, the
# better a layer separates them; permuted labels say how much of that is chance.

# %%
scores, labels = unit_scores(model, list(svds), digits.test, directions=svds, show_progress=False)
tests = {
    layer: separation_test(values, labels, show_progress=False) for layer, values in scores.items()
}
print(tests["head"])
figure, _ = plot_hypergraph(
    tests["head"].hypergraph, title="head: digits and the directions they are in"
)

# %% [markdown]
# At the head, nearly every digit is in a single direction, and some have one to themselves.
# `style="bands"` draws the same with HyperNetX, and `.to_hypernetx()` hands it over for analysis. How
# similar the digits' sets of directions are, layer by layer:

# %%
figure, _ = plot_class_separation(tests)

# %% [markdown]
# A small p-value says that the layer tells images of different digits apart, not that training made
# it so: the images differ to begin with. The same scores of a network of random weights are
# the control. (`nan`: fewer than two digits are in any direction of the layer.)

# %%
twin = small_cnn().eval()
untrained_scores, labels = unit_scores(
    twin, list(svds), digits.test, directions=model_svd(twin), show_progress=False
)
print(f"{'layer':12s}{'trained':>9s}{'random':>9s}   mean Jaccard similarity of two digits")
for layer, values in untrained_scores.items():
    random = separation_test(values, labels, permutations=1, show_progress=False)
    print(f"{layer:12s}{tests[layer].observed['jaccard']:9.2f}{random.observed['jaccard']:9.2f}")
