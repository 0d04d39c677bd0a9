"""The command line: a thin reader of arguments."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from captum_classfilters._version import __version__

if TYPE_CHECKING:
    from captum_classfilters.cli.identify_folder import FolderJob


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:

        arguments (sequence of str, optional): By default those of the process.

    Returns:
        *int*: 0, or 2 after an error that the message on standard error explains.
    """
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed))
    except (ValueError, OSError, ImportError) as error:
        if parsed.debug:
            raise
        print(f"captum-classfilters: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="captum-classfilters",
        description="Find the filters of a CNN that decide each class.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole job on handwritten digits, offline")
    demo.add_argument("--output", default="demo-output", help="folder (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=20, help="of training (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    _common(demo, _demo)

    identify = commands.add_parser("identify", help="your own model and image folder")
    _model_and_images(identify)
    identify.add_argument(
        "--method",
        nargs="+",
        default=["frequency", "contribution"],
        help="frequency, contribution (default: both, in one pass)",
    )
    identify.add_argument("--limit", type=int, help="use this many images at most")
    identify.add_argument(
        "--explain", type=int, default=0, help="images to explain beside Integrated Gradients"
    )
    _common(identify, _identify)

    compare = commands.add_parser("compare", help="attributions side by side, on your own images")
    _model_and_images(compare)
    compare.add_argument(
        "--method",
        nargs="+",
        help="saliency, input_x_gradient, integrated_gradients, gradient_shap, deep_lift, occlusion, "
        "grad_cam, class_filters; contribution, ablation, frequency, conductance, "
        "gate_integrated_gradients (default: seven of them)",
    )
    compare.add_argument("--limit", type=int, default=50, help="images (default: %(default)s)")
    compare.add_argument("--explain", type=int, default=4, help="to draw (default: %(default)s)")
    _common(compare, _compare)

    layers = commands.add_parser("layers", help="which layers of a model qualify")
    layers.add_argument("--model", required=True, help="of torchvision, or timm:NAME")
    layers.add_argument("--image-size", type=int, help="in pixels (default: the model's own)")
    _common(layers, _layers)
    return parser


def _model_and_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="any classifier of torchvision, resnet18 say, or of timm, timm:resnet18 say",
    )
    parser.add_argument("--checkpoint", help="safetensors file or PyTorch state dict")
    parser.add_argument("--random-weights", action="store_true", help="go on without a checkpoint")
    parser.add_argument("--data", required=True, help="folder with one subfolder for each class")
    parser.add_argument("--layer", help="dotted name, for example layer4; `layers` lists them")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--num-filters", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--num-classes", type=int, help="outputs of the model")
    parser.add_argument("--class-names", help="text file, a line for each output of the model")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace results")


def _common(parser: argparse.ArgumentParser, run: object) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.set_defaults(run=run)


def _demo(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.demo import run_demo

    run_demo(
        arguments.output,
        epochs=arguments.epochs,
        seed=arguments.seed,
        show_progress=not arguments.quiet,
    )
    return 0


def _identify(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.identify_folder import run_identify

    run_identify(_folder_job(arguments))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.compare_folder import DEFAULT, run_compare

    arguments.method = arguments.method or DEFAULT
    run_compare(_folder_job(arguments))
    return 0


def _folder_job(arguments: argparse.Namespace) -> "FolderJob":
    from captum_classfilters.cli.identify_folder import FolderJob

    return FolderJob(
        model=arguments.model,
        data=arguments.data,
        layer=arguments.layer,
        output=arguments.output,
        checkpoint=arguments.checkpoint,
        random_weights=arguments.random_weights,
        methods=tuple(arguments.method),
        num_filters=arguments.num_filters,
        num_classes=arguments.num_classes,
        class_names=arguments.class_names,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        limit=arguments.limit,
        explain=arguments.explain,
        device=arguments.device,
        overwrite=arguments.overwrite,
        show_progress=not arguments.quiet,
    )


def _layers(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.identify_folder import layer_table

    print(layer_table(arguments.model, arguments.image_size))
    return 0
