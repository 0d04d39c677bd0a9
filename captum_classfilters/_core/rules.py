"""What a method tells the collector of evidence; the collector knows no method by name."""

from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from captum_classfilters._core.captum import TargetType
from captum_classfilters._core.forward import FilterMaps
from captum_classfilters._core.replay.suffix_replay import SuffixReplay
from captum_classfilters._core.types import JsonDict, ModelInputs

_RULE = {"scores_from", "weights_from", "features_of"}
_ATTRIBUTE = {"attribute", "filter_scores"}


class FilterRule:
    """A method whose evidence follows from what a layer puts out: its rule, and what it needs.

    A class that changes the rule says so by one of ``scores_from``, ``weights_from`` and
    ``features_of``. One that changes ``attribute`` alone is asked for its attributions instead.
    """

    layer: Any
    channel_dim: int | None = None

    #: Scores of this class's rule are whole numbers, votes for example: they are counted without
    #: rounding. A subclass with another rule says it again if it still holds.
    counts_votes: ClassVar[bool] = False
    #: An image's evidence is another one for another target.
    depends_on_target: bool = True
    #: The rule asks for derivatives of the scores at the layer.
    needs_derivative: bool = False
    #: What the features are where they are not the layer's filters; ends a table's layer name.
    features_name: str | None = None

    @property
    def default_num_filters(self) -> int:
        """How many filters are selected for each class if nothing is said."""
        return 5

    @property
    def options(self) -> JsonDict:
        """The method's own options, for the record."""
        return {}

    @property
    def has_current_rule(self) -> bool:
        """Whether the rule is what ``attribute`` and ``filter_scores`` follow."""
        if _ATTRIBUTE & vars(self).keys():
            return False
        for kind in type(self).__mro__:
            if _RULE & vars(kind).keys():
                return True
            if _ATTRIBUTE & vars(kind).keys():
                return False
        return False

    @property
    def has_whole_scores(self) -> bool:
        """Whether the scores are whole numbers by ``counts_votes``, which speaks of the rule of its
        class alone: another one written below it may give any numbers."""
        if not self.has_current_rule or _RULE & vars(self).keys():
            return False
        for kind in type(self).__mro__:
            if "counts_votes" in vars(kind):
                return self.counts_votes
            if _RULE & vars(kind).keys():
                return False
        return False

    def filter_scores(self, attributions: Tensor, attribute_to_layer_input: bool = False) -> Tensor:
        """Scores (N, K) of what ``attribute`` returned."""
        raise NotImplementedError

    def features_of(self, maps: FilterMaps, module: nn.Module) -> FilterMaps:
        """The maps that the rule works on: those of the layer's filters."""
        return maps

    def scores_from(self, maps: FilterMaps, target: TargetType) -> Tensor:
        """The rule: scores (N, K) of a batch's images."""
        raise NotImplementedError(f"{type(self).__name__} has no rule: define scores_from.")


class Ablation(Protocol):
    """A method that can run its model without some of a layer's filters."""

    forward_func: Any
    layer: Any

    @property
    def options(self) -> JsonDict:
        """The method's own options, for the record."""

    def replay(
        self, layer: nn.Module, inputs: ModelInputs, *, at_input: bool = False
    ) -> SuffixReplay:
        """A batch that has run once, ready to run without filters of a layer."""
