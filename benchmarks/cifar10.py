"""CIFAR-10 and the public CIFAR ResNets, for benchmarks and reference tests."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.shared import DATA, made_up, random_images

TEST, TRAIN = "cifar10_test.npz", "cifar10_train20k.npz"
GATED = "resnet20_csg_cifar10.safetensors"
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zeros (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Block output."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images (He et al. 2016): 16, 32, 64 channels."""

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of normalized images (N, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def available() -> bool:
    """Whether the data folder is there."""
    return (DATA / TEST).is_file()


def pretrained(depth: int = 20, name: str | None = None) -> CifarResNet:
    """A public checkpoint, in evaluation mode."""
    if made_up():
        torch.manual_seed(0)
        return CifarResNet(depth).eval()
    model = CifarResNet(depth)
    state = load_file(DATA / (name or f"resnet{depth}_cifar10.safetensors"))
    model.load_state_dict({key: value for key, value in state.items() if key != "gate"})
    return model.eval()


def gated() -> tuple[CifarResNet, Tensor]:
    """The public ResNet-20 that was trained with a class-specific gate, and its gate (10, 64)."""
    model = pretrained(20, GATED)
    if made_up():
        return model, torch.rand(10, 64, generator=torch.Generator().manual_seed(1))
    return model, load_file(DATA / GATED)["gate"]


def images(split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalized images and labels of the test split or of the 20,000 training images."""
    if made_up():
        return random_images(count, 3, 32)
    file = DATA / (TEST if split == "test" else TRAIN)
    with np.load(file, allow_pickle=False) as data:
        x, y = data["x"], data["y"].astype(np.int64)
    if count is not None and count < len(x):  # the files are ordered by class
        chosen = np.random.default_rng(0).permutation(len(x))[:count]
        x, y = x[chosen], y[chosen]
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(255)
    return (pixels - MEAN) / STD, torch.from_numpy(y)


def loader(
    split: str = "test", count: int | None = None, batch_size: int = 250, shuffle: bool = False
) -> DataLoader:
    """Batches of (images, labels)."""
    dataset = TensorDataset(*images(split, count))
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


@torch.no_grad()
def early_maps(x: Tensor, file: Path | None = None) -> Tensor:
    """What the public ResNet-20's first two stages make of images, (N, 32, 16, 16) in half precision;
    kept in a file if one is named, and taken from it if it is there."""
    if file is not None and file.is_file():
        return load_file(file)["maps"]
    model = pretrained()
    early = nn.Sequential(model.conv1, model.bn1, nn.ReLU(), model.layer1, model.layer2)
    maps = torch.cat([early(images).half() for images in x.split(250)]).contiguous()
    if file is not None:
        save_file({"maps": maps}, file)
    return maps


@torch.no_grad()
def late_means(model: CifarResNet, maps: Tensor) -> Tensor:
    """The head's inputs (N, 64) that a network's last stage makes of maps."""
    return torch.cat([model.layer3(own.float()).mean((2, 3)) for own in maps.split(250)])


def last_stage_trained(
    maps: Tensor, y: Tensor, epochs: int, file: Path | None = None
) -> CifarResNet:
    """The public ResNet-20 whose last stage and head are drawn anew and trained on what comes before
    them: SGD of one cycle, batches of 128, no augmentation. Kept in a file if one is named (its name
    ends in .safetensors), and taken from it if it is there."""
    model, size = pretrained(), min(128, len(y))
    torch.manual_seed(0)
    fresh = CifarResNet(20)
    model.layer3, model.linear = fresh.layer3, fresh.linear
    if file is not None and file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    last = nn.ModuleList([model.layer3, model.linear]).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        last.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * (len(y) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(epoch))
        for rows in order[: len(y) // size * size].split(size):
            own = maps[rows].float().contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            F.cross_entropy(model.linear(model.layer3(own).mean((2, 3))), y[rows]).backward()
            optimizer.step()
            schedule.step()
    if file is not None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """Top-1 accuracy in per cent."""
    right = total = 0
    for x, y in batches:
        right += int((model(x).argmax(1) == y).sum())
        total += len(y)
    return 100 * right / total
