"""One of each result that the package returns, made by calling it, with class names as people have them."""

import copy
import functools
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import captum_classfilters as ccf
from captum_classfilters import answers, gates, heads, identify, metrics, pruning, spectral, testing
from captum_classfilters.identify.evidence import Evidence
from captum_classfilters.visualize import FeatureObjective, RandomTransform, visualize_features
from tests.models import QUIET

CLASSES, FILTERS, IMAGES = 12, 64, 60
HOSTILE = "<script>alert('x')</script> & \"co\", Felis"
NAMES = [f"{HOSTILE} number {index} with a name of many words" for index in range(CLASSES)]


@functools.cache
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, FILTERS, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(FILTERS, CLASSES),
    ).eval()


@functools.cache
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, 3, 9, 9, generator=generator)
    return images, torch.arange(IMAGES) % CLASSES


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=25)


def method() -> ccf.LayerFilterContribution:
    return ccf.LayerFilterContribution(network(), "3")


@functools.cache
def table() -> ccf.ClassFilters:
    return method().identify(loader(), num_filters=5, class_names=NAMES, **QUIET)


@functools.cache
def evidence() -> Evidence:
    return identify.collect_evidence(method(), loader(), class_names=NAMES, **QUIET)


@functools.cache
def reduction() -> Any:
    ablation = ccf.LayerFilterAblation(network(), "3")
    return identify.accuracy_reduction(ablation, loader(), class_names=NAMES, **QUIET)


@functools.cache
def features() -> tuple[torch.Tensor, torch.Tensor]:
    return identify.collect_features(network(), "3", loader(), **QUIET)


@functools.cache
def order() -> pruning.PruningOrder:
    return pruning.GreedyFilterPruning(network(), "3").run(loader(), num_filters=60, **QUIET)


@functools.cache
def scores() -> torch.Tensor:
    return method().filter_scores(method().attribute(data()[0], target=data()[1]))


def head() -> nn.Linear:
    last = network()[6]
    assert isinstance(last, nn.Linear)
    return last


def decomposed() -> nn.Module:
    return ccf.decompose(network(), table())


@functools.cache
def svd() -> Any:
    return spectral.layer_svd(network()[2])


@functools.cache
def profiles() -> Any:
    return spectral.profile_images(network(), ["1", "3"], loader(), **QUIET)


def hypergraph() -> Any:
    return spectral.class_hypergraph(scores(), data()[1], threshold=0.02, class_names=NAMES)


def compressed() -> Any:
    return pruning.compress_layer(network(), "6", data()[0][:2], clusters=4, **QUIET)


def specialist() -> Any:
    options: dict[str, Any] = {"dataloader": loader(), **QUIET}
    return pruning.specialize(network(), table(), [0, NAMES[3]], data()[0][:2], **options)


def class_specialist() -> Any:
    x = torch.cat([data()[0]] * 40)
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    some = [(x, data()[1].repeat(40))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the network has not learned
        return answers.build_specialist(
            network(), [0, NAMES[3]], some, class_names=NAMES, budget=0.9, **QUIET
        )


def bright(images: torch.Tensor) -> torch.Tensor:
    """With something, of which the network's last filters make something else."""
    return images + 2.0


@functools.cache
def shortcuts() -> Any:
    options: dict[str, Any] = {"class_names": NAMES, "least": 0.0, "permutations": 1999, **QUIET}
    return answers.find_shortcuts(network(), loader(), bright, **options)


def repaired() -> Any:
    other = [(data()[0].flip(-1), data()[1])]
    return answers.repair(network(), shortcuts(), other, bright, outputs=[NAMES[0]], **QUIET)


def unconfused() -> Any:
    images, labels = data()
    predicted = network()(images).argmax(1)
    wrong = int((predicted != labels).nonzero()[0])
    true, other = int(labels[wrong]), int(predicted[wrong])
    judged = [(images.flip(-1), labels)]
    options: dict[str, Any] = {"class_names": NAMES, "repetitions": 2, **QUIET}
    return answers.repair_confusion(network(), loader(), judged, true, other, **options)


def reasons() -> Any:
    detector = answers.ClassFilterOOD(network(), table())
    return detector.fit(loader(), **QUIET).reasons(data()[0][:2])


def forgetting_audit() -> Any:
    forgotten = answers.forget_class(network(), loader(), 1, erase="probe", **QUIET)
    models = {"original": network(), "forgotten": forgotten}
    return answers.audit_forgetting(models, 1, loader(), loader(), **QUIET)


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    activations = torch.rand(IMAGES, FILTERS, 4, 4, generator=torch.Generator().manual_seed(2))
    return activations, metrics.center_box_maps(IMAGES, (4, 4)) > 0


def comparison() -> Any:
    images, labels = data()
    methods = {"ours": method(), HOSTILE: ccf.ClassFilterSaliency(network(), "3", table())}
    options: dict[str, Any] = {"n_perturb_samples": 2, "sensitivity_samples": 1, "points": 2}
    return metrics.compare_attributions(
        network(), methods, images[:3], labels[:3], **options, **QUIET
    )


def gate() -> gates.ClassSpecificGate:
    return gates.ClassSpecificGate(CLASSES, FILTERS)


def trainer() -> gates.GatedTrainer:
    own = gate()
    model = network()
    own.attach(model, "3")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gated = torch.optim.SGD([*model.parameters(), *own.parameters()], lr=0.0)
    found = gates.GatedTrainer(model, own, optimizer, gated)
    own.detach()
    return found


RESULTS: dict[str, Any] = {
    # Rooms of the table.
    "ClassFilters": table,
    "ClassRow": lambda: table()[3],
    "Agreement": lambda: table().agreement(table()),
    "ClassOverlap": lambda: table().overlap(),
    "FilterLayers": lambda: ccf.list_filter_layers(network(), data()[0][:2]),
    "FilterLayer": lambda: ccf.list_filter_layers(network(), data()[0][:2])[0],
    "FilterGate": lambda: ccf.FilterGate(network(), "3"),
    "ClassScores": lambda: ccf.ClassScores(network(), torch.relu),
    # identify
    "Evidence": evidence,
    "Stability": lambda: evidence().stability(5),
    "LabelPermutation": identify.LabelPermutation,
    "FilterContrast": lambda: identify.contrast_classes(
        method(), loader(), 0, 1, class_names=NAMES, **QUIET
    ),
    "ConfusionFilters": lambda: identify.confusion_filters(
        method(), loader(), class_names=NAMES, **QUIET
    ),
    "ActivationScores": lambda: identify.activation_scores(network(), "3", loader(), **QUIET),
    "Exemplars": lambda: identify.exemplars(network(), "3", loader(), **QUIET)["3"],
    "ExemplarSide": lambda: identify.exemplars(network(), "3", loader(), **QUIET)["3"].highest,
    "AccuracyReduction": reduction,
    "MetricReduction": lambda: identify.metric_reduction(
        ccf.LayerFilterAblation(network(), "3"),
        loader(),
        lambda outputs, labels: (outputs.argmax(1) == labels).double().mean(),
        **QUIET,
    ),
    "RandomWeightsNull": lambda: identify.random_weights_null(
        method(), loader(), repetitions=2, class_names=NAMES, num_filters=5, **QUIET
    ),
    # attr
    **{
        name: functools.partial(lambda kind: kind(network(), "3"), getattr(ccf, name))
        for name in ("LayerFilterAblation", "LayerFilterContribution", "LayerFilterFrequency")
    },
    "ClassFilterSaliency": lambda: ccf.ClassFilterSaliency(network(), "3", table()),
    "LayerClassGate": lambda: ccf.LayerClassGate(network(), "3", torch.rand(CLASSES, FILTERS)),
    "LayerSingularDirection": lambda: ccf.LayerSingularDirection(network(), "2"),
    # metrics
    "FilterInfidelity": lambda: metrics.filter_infidelity(
        network(), "3", data()[0], {HOSTILE: scores()}, target=data()[1], n_perturb_samples=2
    ),
    "CascadingRandomization": lambda: metrics.cascading_randomization(
        network(), lambda model: ccf.LayerFilterContribution(model, "3"), data()[0][:4], target=1
    ),
    "ClassifierScores": lambda: metrics.evaluate_classifier(network(), loader(), **QUIET),
    "FilterLocalization": lambda: metrics.filter_localization(*masks(), data()[1]),
    "Localization": lambda: metrics.localization(masks()[0][:, 0], masks()[1]),
    "RemoveAndRetrain": lambda: metrics.remove_and_retrain(
        network(),
        "3",
        {HOSTILE: table()},
        loader(),
        loader(),
        num_filters=[2],
        epochs=1,
        repetitions=1,
        **QUIET,
    ),
    "FilterSensitivity": lambda: metrics.filter_max_sensitivity(
        method(), data()[0][:4], target=1, n_perturb_samples=2
    ),
    "FilterCurves": lambda: metrics.filter_curves(
        network(), "3", data()[0], {HOSTILE: scores()}, target=data()[1], num_filters=[2, 7]
    ),
    "Validity": lambda: metrics.validate(
        lambda loader: metrics.correlation_filters(*next(iter(loader))),
        [features()],
        num_filters=2,
    ),
    "ClassCurves": lambda: metrics.class_curves(
        network(), "3", {HOSTILE: table()}, loader(), num_filters=[2, 7], **QUIET
    ),
    "AttributionComparison": comparison,
    "AttributionTable": lambda: comparison().pixels,
    "MethodComparison": lambda: metrics.compare_methods(
        network(),
        "3",
        loader(),
        loader(),
        methods={HOSTILE: table(), "twice": table()},
        num_filters=5,
        **QUIET,
    ),
    "CollateralDamage": lambda: metrics.collateral_damage(
        network(), "3", table(), loader(), repetitions=1, **QUIET
    ),
    # heads
    "Coverage": lambda: heads.coverage(torch.arange(FILTERS) % 9, torch.arange(FILTERS) < 5),
    "GramSpectrum": lambda: heads.gram_spectrum(*features()),
    "AccuracyCurve": lambda: ccf.accuracy_curve(
        network(), {HOSTILE: table()}, loader(), repetitions=1, **QUIET
    ),
    "SetOverlap": lambda: heads.set_overlap(table()),
    "Essentiality": lambda: heads.essentiality(
        *features(), head().weight.detach(), head().bias.detach(), table()
    ),
    "Epoch": lambda: ccf.fine_tune(
        copy.deepcopy(network()), loader(), loader(), learning_rate=0.0, **QUIET
    )[0],
    "TopMass": lambda: heads.top_mass(*features(), [1, 5, 20]),
    "LayerMeasurement": lambda: heads.layer_sweep(network(), ["1"], loader(), **QUIET)[0],
    "RemovedClass": lambda: heads.remove_class(head(), 2),
    "HeadComparison": lambda: heads.compare_heads(
        network(), decomposed(), data()[0][:2], repetitions=1
    ),
    "HeadCost": lambda: (
        heads.compare_heads(network(), decomposed(), data()[0][:2], repetitions=1).before
    ),
    "DecomposedLinear": lambda: heads.find_head(decomposed())[1],
    # gates
    "ClassSpecificGate": gate,
    "GateSchedule": gates.GateSchedule,
    "GatedTrainer": trainer,
    "MaskingResult": lambda: gates.masking_test(network(), "3", table(), loader(), **QUIET),
    # pruning
    "GreedyFilterPruning": lambda: pruning.GreedyFilterPruning(network(), ["1", "3"]),
    "PruningOrder": order,
    "ClassFilterImportance": lambda: pruning.ClassFilterImportance(
        network(),
        ccf.LayerFilterContribution(network(), "2").identify(loader(), **QUIET),
        data()[0][:2],
    ),
    "Specialist": specialist,
    "SpecialistAccuracy": lambda: specialist().accuracy,
    "FilterInterpretation": lambda: pruning.class_interpretation(reduction())[0],
    "ClassEffect": lambda: pruning.class_interpretation(reduction())[0].top[0],
    "PrunableLayers": lambda: pruning.prunable_layers(network(), data()[0][:2], **QUIET),
    "PrunableLayer": lambda: pruning.prunable_layers(network(), data()[0][:2], **QUIET)[0],
    "CompressedLayer": compressed,
    "CompressedWeights": lambda: compressed().weights,
    "CompressionReport": lambda: compressed().report,
    "RemovalCurves": lambda: pruning.accuracy_after_removal(
        network(), "3", {HOSTILE: torch.arange(FILTERS)}, loader(), **QUIET
    ),
    "SelectivityTest": lambda: pruning.selectivity_test(
        torch.arange(FILTERS), torch.arange(FILTERS) < 5
    ),
    "NetworkComparison": lambda: pruning.compare_networks(
        network(), decomposed(), data()[0][:2], repetitions=1
    ),
    "NetworkCost": lambda: (
        pruning.compare_networks(network(), decomposed(), data()[0][:2], repetitions=1).before
    ),
    "LayerwiseFineTuning": lambda: pruning.LayerwiseFineTuning(loader(), 0.1),
    # answers
    "Shortcuts": shortcuts,
    "ClassSpecialist": class_specialist,
    "Repair": repaired,
    "ConfusionRepair": unconfused,
    "UnknownReasons": reasons,
    "ForgettingAudit": forgetting_audit,
    # spectral
    "LayerSVD": svd,
    "ModelSVD": lambda: spectral.model_svd(network()),
    "FactoredLayer": lambda: spectral.FactoredLayer(network()[2]),
    "WeightMatrix": lambda: spectral.weight_matrix(network()[2]),
    "PowerLaw": lambda: spectral.fit_power_law(spectral.eigenvalues(network()[2])),
    "MarchenkoPasturFit": lambda: spectral.fit_marchenko_pastur(
        spectral.eigenvalues(network()[2]), (64, 144)
    ),
    "MarchenkoPastur": lambda: (
        spectral.fit_marchenko_pastur(spectral.eigenvalues(network()[2]), (64, 144)).law
    ),
    "ModelSpectra": lambda: spectral.model_spectra(network()),
    "LayerSpectrum": lambda: spectral.model_spectra(network())["2"],
    "SpectraComparison": lambda: spectral.compare_with_random(network()),
    "Profile": lambda: profiles()[0],
    "ImageProfiles": profiles,
    "Hypergraph": hypergraph,
    "SeparationTest": lambda: spectral.separation_test(
        scores(), data()[1], threshold=0.02, class_names=NAMES, permutations=9, **QUIET
    ),
    # testing, visualize
    "PlantedNetwork": testing.planted_network,
    "Recovery": lambda: testing.recovery(table(), table().selected),
    "TrainedNetwork": lambda: testing.trained_network("shared"),
    "Verification": lambda: testing.trained_network("shared").verify(40),
    "FeatureObjective": lambda: FeatureObjective.of_filter(network()[3], 2),
    "RandomTransform": RandomTransform,
    "FeatureVisualization": lambda: visualize_features(
        network(), FeatureObjective.of_filter("3", 2), (3, 9, 9), steps=2, **QUIET
    ),
}
