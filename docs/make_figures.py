"""Draw the figures of the README and the documentation: ``python docs/make_figures.py``."""

import shutil
import tempfile
from pathlib import Path

import torch

from captum_classfilters.demo import load_digits, run_demo, small_cnn, train_classifier
from captum_classfilters.spectral import compare_with_random
from captum_classfilters.visualize import plot_exponents, plot_spectrum

FIGURES = Path(__file__).parent / "figures"
NAMES = {
    "class_filters_contribution.png": "class_filters.png",
    "accuracy_curve.png": "accuracy_curve.png",
    "explanations.png": "explanations.png",
}


def spectra() -> None:
    """Spectra of the demo's network, and of its random twin."""
    torch.manual_seed(0)
    model = train_classifier(small_cnn(), load_digits().train, epochs=20)
    compared = compare_with_random(model)
    figure, _ = plot_spectrum(compared.model["filters.0"])
    figure.savefig(FIGURES / "spectrum.png", dpi=110)
    figure, _ = plot_exponents({"trained": compared.model, "random twin": compared.twin})
    figure.savefig(FIGURES / "exponents.png", dpi=110)


def main() -> None:
    """Run the demo and keep its pictures."""
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder)
        for source, name in NAMES.items():
            shutil.copy(Path(folder) / source, FIGURES / name)
    spectra()


if __name__ == "__main__":
    main()
