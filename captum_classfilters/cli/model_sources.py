"""The models that the command line knows by name: torchvision's, and timm's where it is installed."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor, nn

from captum_classfilters._core.names import close_names, kind_of
from captum_classfilters._core.types import JsonDict

TIMM = "timm:"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIZE = 224


@dataclass(frozen=True)
class ModelSource:
    r"""
    A classifier of torchvision.

    Args:

        name (str): Its name there.
        image_size (int, optional): Side of the images in pixels, if it is not the model's own.
    """

    name: str
    image_size: int | None = None

    @property
    def has_weights(self) -> bool:
        """Whether models are built with weights that are worth using."""
        return False

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.image_size or _SIZE

    def build(self, num_classes: int) -> nn.Module:
        """The model with random weights, without the classifiers that only training uses."""
        from torchvision import models

        model: nn.Module = models.get_model(self.name, weights=None, num_classes=num_classes)
        if hasattr(model, "aux_logits"):
            model.aux_logits = False  # type: ignore[assignment]
            for name, _ in list(model.named_children()):
                if name.lower().startswith("aux"):
                    setattr(model, name, None)
        return model

    def head_tensor(self, model: nn.Module) -> str:
        """Name of a tensor whose length is the number of outputs."""
        return list(model.state_dict())[-1]  # a file need not keep the order of the layers

    def preparation(self) -> Callable[[object], Tensor]:
        """From an image to what the model takes: resize, center crop, normalize."""
        from torchvision import transforms

        return transforms.Compose(
            [
                transforms.Resize(round(self.size * 256 / 224)),
                transforms.CenterCrop(self.size),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )

    def categories(self) -> Iterator[tuple[list[str], dict[str, int]]]:
        """For public weights the names of all outputs, and the output of each folder's name."""
        from torchvision.models import get_model_weights

        for weights in get_model_weights(self.name):
            names = list(weights.meta.get("categories", ()))
            yield names, places_of(names)


class TimmSource(ModelSource):
    """A classifier of timm, with the size, crop and normalization of its data configuration."""

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.image_size or int(self._config["input_size"][-1])

    @property
    def _config(self) -> JsonDict:
        import timm

        config = timm.get_pretrained_cfg(self.name)
        return {} if config is None else config.to_dict()

    def build(self, num_classes: int) -> nn.Module:
        """The model with random weights; one of a fixed size is built for the images' size."""
        import timm

        other = self._config.get("fixed_input_size") and self.image_size
        options: JsonDict = {"img_size": self.image_size} if other else {}
        try:
            model: nn.Module = timm.create_model(
                self.name, pretrained=False, num_classes=num_classes, **options
            )
        except TypeError as error:
            own = int(self._config["input_size"][-1])
            raise ValueError(
                f"timm's {self.name} takes images of {own} pixels only; leave --image-size out."
            ) from error
        return model

    def head_tensor(self, model: nn.Module) -> str:
        """Name of a tensor whose length is the number of outputs."""
        heads = self._config.get("classifier") or ()
        names = [heads] if isinstance(heads, str) else heads
        own = [f"{name}.weight" for name in names if f"{name}.weight" in model.state_dict()]
        return own[0] if own else super().head_tensor(model)

    def preparation(self) -> Callable[[object], Tensor]:
        """From an image to what the model takes, as timm evaluates it."""
        from timm.data import create_transform, resolve_data_config

        config = resolve_data_config(pretrained_cfg=self._config)
        config["input_size"] = (config["input_size"][0], self.size, self.size)
        prepare: Callable[[object], Tensor] = create_transform(**config, is_training=False)
        return prepare

    def categories(self) -> Iterator[tuple[list[str], dict[str, int]]]:
        """The names of all outputs as timm has them. A folder may be called by the label (n01440764),
        the description (tench, Tinca tinca) or its first word or words (tench)."""
        from timm.data import ImageNetInfo, infer_imagenet_subset

        own = self._config.get("label_names")
        subset = infer_imagenet_subset(self._config)
        if own:
            yield list(own), places_of(own)
        if subset:
            info = ImageNetInfo(subset)
            labels = info.label_names()
            names = [info.label_name_to_description(label) for label in labels]
            short = [name.split(",")[0] for name in names]
            yield names, {**places_of(short), **places_of(names), **places_of(labels)}


class FunctionSource(ModelSource):
    """The user's own: ``module:function``, called without arguments, returns a classifier with its weights;
    images are prepared as torchvision's models take them."""

    @property
    def has_weights(self) -> bool:
        """What the function returns is taken as it is."""
        return True

    def build(self, num_classes: int) -> nn.Module:
        """What the function returns."""
        module, _, function = self.name.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")  # modules beside which the command is run
        try:
            model: object = getattr(import_module(module), function)()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"--model {self.name} is no function of no arguments that returns a model: {error}"
            ) from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model {self.name} returned {kind_of(model)}, not a model.")
        return model

    def categories(self) -> Iterator[tuple[list[str], dict[str, int]]]:
        """None are known."""
        return iter(())


def places_of(names: Iterable[str]) -> dict[str, int]:
    """The output of each name that no two outputs have."""
    names = list(names)
    counts = Counter(names)
    return {name: place for place, name in enumerate(names) if counts[name] == 1}


def model_source(name: str, image_size: int | None = None) -> ModelSource:
    """The library that has a model of this name: torchvision, or else timm; ``timm:NAME`` is timm's, and any
    other ``module:function`` the user's own.

    Args:

        name (str): The name.
        image_size (int, optional): Side of the images in pixels.

    Returns:
        *ModelSource*.

    Raises:
        ValueError: Neither has it.
        ImportError: timm is asked for and not installed.
    """
    from torchvision import models

    if ":" in name and not name.startswith(TIMM):
        return FunctionSource(name, image_size)
    known = list(models.list_models(module=models))
    if name in known:
        return ModelSource(name, image_size)
    installed = find_spec("timm") is not None
    own = name.removeprefix(TIMM)
    if own != name and not installed:
        raise ImportError(f"The model {name!r} needs timm: pip install timm.")
    if installed:
        import timm

        if timm.is_model(own):
            return TimmSource(own, image_size)
        others = [f"{TIMM}{other}" for other in timm.list_models()]
    if own != name:
        raise ValueError(
            f"timm has no classifier {own!r}; the nearest names: {_near(name, others)}."
        )
    if installed:
        raise ValueError(
            f"torchvision and timm have no classifier {name!r}; the nearest names: "
            f"{_near(name, known)}; {_near(TIMM + name, others)}."
        )
    raise ValueError(
        f"torchvision has no classifier {name!r}; the nearest names: {_near(name, known)}. Those of "
        "timm need timm: pip install timm."
    )


def _near(name: str, known: Sequence[str]) -> str:
    return ", ".join(close_names(name, known)) or "none"
