"""Draw the figures of the README and the documentation: ``python docs/make_figures.py``."""

import shutil
import tempfile
from pathlib import Path

from captum_classfilters.demo import run_demo

FIGURES = Path(__file__).parent / "figures"
NAMES = {
    "class_filters_contribution.png": "class_filters.png",
    "accuracy_curve.png": "accuracy_curve.png",
    "explanations.png": "explanations.png",
}


def main() -> None:
    """Run the demo and keep its pictures."""
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder)
        for source, name in NAMES.items():
            shutil.copy(Path(folder) / source, FIGURES / name)


if __name__ == "__main__":
    main()
