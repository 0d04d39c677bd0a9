"""Draw the figures of the README and the documentation: ``python docs/make_figures.py``."""

import shutil
import tempfile
from pathlib import Path

import torch

from captum_classfilters import LayerFilterContribution
from captum_classfilters.demo import load_digits, run_demo, small_cnn, train_classifier
from captum_classfilters.evaluate import compare_methods
from captum_classfilters.identify import contrast_classes
from captum_classfilters.visualize import plot_filter_contrast, plot_method_comparison

FIGURES = Path(__file__).parent / "figures"
NAMES = {
    "class_filters_contribution.png": "class_filters.png",
    "accuracy_curve.png": "accuracy_curve.png",
    "explanations.png": "explanations.png",
}


def main() -> None:
    """Run the demo and keep its pictures; draw those that it has not."""
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder)
        for source, name in NAMES.items():
            shutil.copy(Path(folder) / source, FIGURES / name)
    draw_comparisons()


def draw_comparisons() -> None:
    """Methods against methods, and digit against digit."""
    torch.manual_seed(0)
    digits = load_digits()
    model = train_classifier(small_cnn(), digits.train)
    comparison = compare_methods(model, "filters", digits.train, digits.test)
    figure, _ = plot_method_comparison(comparison)
    figure.savefig(FIGURES / "method_comparison.png", dpi=110)
    method = LayerFilterContribution(model, "filters")
    contrast = contrast_classes(method, digits.test, 3, 8)
    figure, _ = plot_filter_contrast(contrast, num_filters=5)
    figure.savefig(FIGURES / "filter_contrast.png", dpi=110)


if __name__ == "__main__":
    main()
