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
# # Train class-specific filters
#
# The other tutorials look for class filters in a network as it is. Here the network is *trained* to
# have them: a matrix of gates says which filters a class may use, and is learned with the weights
# (Liang et al., [Training Interpretable Convolutional Neural Networks by Differentiating
# Class-specific Filters](https://arxiv.org/abs/2007.08194)). The images are scikit-learn's 1,797
# handwritten digits; everything runs on a laptop's CPU in under a minute.

# %%
import torch
import torch.nn.functional as F

from captum_classfilters import ClassSpecificGate, LayerClassGate, LayerFilterContribution
from captum_classfilters.attr import filter_activation_maps
from captum_classfilters.cli.demo import load_digits, small_cnn
from captum_classfilters.gates import GatedTrainer, GateSchedule, masking_test
from captum_classfilters.identify import collect_features
from captum_classfilters.metrics import (
    evaluate_classifier,
    mutual_information_bound,
    mutual_information_matrix,
    mutual_information_score,
)
from captum_classfilters.visualize import (
    plot_explanations,
    plot_filter_correlation,
    plot_gate_and_weight,
    plot_mutual_information,
)

digits = load_digits()
EPOCHS = 20
QUIET = {"show_progress": False}

# %% [markdown]
# ## Attach a gate
#
# `attach` needs a model and the name of a layer, of any model. The hook does nothing until a forward
# pass is made inside `gate.gating(labels)`: there, filter $k$ of an image of class $y$ is multiplied by
# $G_{yk}$. Prediction never uses the gate.

# %%
torch.manual_seed(0)
gated = small_cnn()
gate = ClassSpecificGate(num_classes=10, num_filters=64).attach(gated, "filters")
print(gate)

images, labels = next(iter(digits.train))
with gate.gating(labels):
    loss_of_the_gated_path = F.cross_entropy(gated(images), labels)

# %% [markdown]
# ## Train
#
# `GatedTrainer` alternates plain and gated steps; here two of three batches are gated. After each
# gated step the gate is projected: every filter stays fully open for one class at least. The same
# class with a schedule that never comes to a gated step trains the plain network, for comparison.


# %%
def trained(model, gate, schedule):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(
        [*model.parameters(), *gate.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-4
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    trainer = GatedTrainer(
        model, gate, optimizer, scheduler=scheduler, schedule=schedule, regularization=0.05
    )
    return trainer.fit(digits.train, digits.test, epochs=EPOCHS, **QUIET)


history = trained(gated, gate, GateSchedule(unit="batch", period=3, gated=2))
for epoch in history[:: EPOCHS // 4]:
    print(
        f"epoch {epoch.epoch:2d}: density {epoch.density:.3f}, test {epoch.validation_accuracy:.3f}"
    )

torch.manual_seed(0)
plain = small_cnn()
unused = ClassSpecificGate(10, 64).attach(plain, "filters")
trained(plain, unused, GateSchedule(warmup=EPOCHS))
unused.detach()
gate.detach()  # both models are as if there had never been a gate
gated.eval()
plain.eval()
for name, model in (("plain", plain), ("gated", gated)):
    print(f"{name}: test accuracy {evaluate_classifier(model, digits.test, **QUIET).accuracy:.3f}")

# %% [markdown]
# In a loop of one's own it is three lines more (`gating`, `regularizer`, `project`), and under
# Lightning a callback; see [the method's page](../methods/class_specific_gate).
#
# ## The gate is the table of class filters
#
# A class's filters are those with **high** gates. Below, the gate, the head's weights, and the weights
# of the plain network: with a gate, a class's large weights are its open gates.

# %%
table = LayerClassGate(gated, "filters", gate.weight).class_filters()
table = table.with_selection(gate.weight.detach() > 0.5)
print("filters of a three:", table.filters_of(3).tolist())
figure, _ = plot_gate_and_weight(gate.weight, gated.head.weight, other_weight=plain.head.weight)

# %% [markdown]
# ## Are filters more specific?
#
# How much does one filter's activation say about one class? The score is the mean over filters of
# the largest mutual information with a class. No filter can exceed the entropy of "is it this
# class", 0.325 nats for ten equal classes.

# %%
bound = float(mutual_information_bound(digits.test_labels).mean())
information = {}
for name, model in (("plain", plain), ("gated", gated)):
    features, test_labels = collect_features(model, "filters", digits.test, **QUIET)
    information[name] = mutual_information_matrix(features, test_labels)
    print(f"{name}: {mutual_information_score(information[name]):.3f} of at most {bound:.3f}")

# %%
figure, _ = plot_mutual_information(information["gated"], bound=bound)

# %% [markdown]
# Do the weights of filters of one class resemble each other?

# %%
figure, _ = plot_filter_correlation(gated.filters[0].weight, gate.weight)

# %% [markdown]
# ## Mask a class's filters
#
# With class-specific filters, a class whose filters are masked is no longer recognized and the
# others hardly notice. For the plain network, the filters that contribute most are masked.

# %%
contribution = LayerFilterContribution(plain, "filters").identify(
    digits.train, num_filters=6, **QUIET
)
for name, model, filters in (("plain", plain, contribution), ("gated", gated, table)):
    result = masking_test(model, "filters", filters, digits.test, **QUIET)
    print(
        f"{name}: recall of the masked class {float(result.own.mean()):.3f}, "
        f"the others lose {100 * result.loss_of_others:.2f} points"
    )

# %% [markdown]
# ## Where do a class's filters look?

# %%
three = int((digits.test_labels == 3).nonzero()[0])
filters = table.filters_of(3)[:4]
maps = filter_activation_maps(gated, "filters", digits.test_images[three : three + 1], filters)
figure, _ = plot_explanations(
    digits.test_images[three : three + 1],
    {f"filter {int(k)}": maps[:, [index]] for index, k in enumerate(filters)},
    titles=["a 3"],
)

# %% [markdown]
# Differences on this one small data set and one seed are an illustration, not a finding; the
# [method's page](../methods/class_specific_gate) has three seeds and larger data.
