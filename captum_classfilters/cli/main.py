"""The command line: a thin reader of arguments."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from captum_classfilters._version import __version__
from captum_classfilters.cli.streams import readers_may_leave

if TYPE_CHECKING:
    from captum_classfilters.cli.folder_job import FolderJob


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:

        arguments (sequence of str, optional): By default those of the process.

    Returns:
        *int*: 0; 2 after an error that the message on standard error explains; 130 after Ctrl-C. Where
        nobody reads what is printed any more, the command goes on, and writes its files.
    """
    with readers_may_leave():
        return _run(_parser().parse_args(arguments))


def _run(parsed: argparse.Namespace) -> int:
    try:
        return int(parsed.run(parsed))
    except KeyboardInterrupt:
        if parsed.debug:
            raise
        print("captum-classfilters: interrupted", file=sys.stderr)
        return 130  # as shells have it
    except (ValueError, OSError, ImportError) as error:
        if parsed.debug:
            raise
        print(f"captum-classfilters: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Errors take a line, as those of the commands do."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end the process."""
        self.exit(2, f"{self.prog}: {message}; --help lists the options.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="captum-classfilters",
        description="Find the filters of a CNN that decide each class, in your own model and image folder.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole job on handwritten digits, offline")
    demo.add_argument("--output", default="demo-output", help="folder (default: %(default)s)")
    demo.add_argument("--epochs", type=int, default=20, help="of training (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    _common(demo, _demo)

    identify = _on_a_folder(commands, "identify", "the filters of each class", _identify)
    identify.add_argument(
        "--method",
        nargs="+",
        default=["frequency", "contribution"],
        help="frequency, contribution (default: both, in one pass)",
    )
    _images(identify, explain=0, what="images to explain beside Integrated Gradients")

    explain = _on_a_folder(commands, "explain", "where images' class filters look", _explain)
    _images(explain, explain=4, what="images to explain")

    compare = _on_a_folder(commands, "compare", "attributions side by side", _compare)
    compare.add_argument(
        "--method",
        nargs="+",
        help="saliency, input_x_gradient, integrated_gradients, gradient_shap, deep_lift, occlusion, "
        "grad_cam, class_filters; contribution, ablation, frequency, conductance, "
        "gate_integrated_gradients (default: seven of them)",
    )
    _images(compare, limit=50, explain=4, what="to draw")

    decompose = _on_a_folder(
        commands,
        "decompose",
        "each class with its own filters only, and what that costs",
        _decompose,
    )
    _images(decompose)

    prune = _on_a_folder(
        commands, "prune", "a smaller network, without a layer's weakest filters", _prune
    )
    prune.add_argument(
        "--share",
        type=float,
        default=0.25,
        help="of the filters to remove (default: %(default)s)",
    )
    _images(prune)

    atlas = _on_a_folder(commands, "atlas", "a site about all of it that opens from disk", _atlas)
    atlas.add_argument("--title", help="of the site (default: model and folder)")
    atlas.add_argument("--labels", help="CSV file of filter and text, by another tool")
    atlas.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="other weights of the same model to set beside it",
    )
    atlas.add_argument(
        "--optimize", type=int, default=0, help="filters that get an optimized image (default: 0)"
    )
    _images(atlas, explain=2, what="right, and wrong, images of each class to explain")

    layers = commands.add_parser("layers", help="which layers of a model qualify")
    layers.add_argument("--model", required=True, help="of torchvision, or timm:NAME")
    layers.add_argument("--image-size", type=int, help="in pixels (default: the model's own)")
    _common(layers, _layers)
    return parser


def _on_a_folder(
    commands: "argparse._SubParsersAction[_Parser]",
    name: str,
    what: str,
    run: object,
) -> argparse.ArgumentParser:
    """A command on a model and an image folder, with the options that all of these have."""
    parser = commands.add_parser(name, help=what)
    parser.add_argument(
        "--model",
        required=True,
        help="any classifier of torchvision, resnet18 say, or of timm, timm:resnet18 say, or your own "
        "module:function that returns one with its weights",
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
    parser.add_argument(
        "--dtype",
        default="float32",
        help="float32, float64, bfloat16 or float16 (default: %(default)s)",
    )
    parser.add_argument(
        "--num-workers",
        type=int,
        default=0,
        help="processes that read images (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="go on without files that are no images"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results")
    _common(parser, run)
    return parser


def _images(
    parser: argparse.ArgumentParser,
    limit: int | None = None,
    explain: int | None = None,
    what: str = "",
) -> None:
    """How many images to use, and to draw."""
    told = "all" if limit is None else limit
    parser.add_argument(
        "--limit", type=int, default=limit, help=f"use this many images at most (default: {told})"
    )
    if explain is not None:
        parser.add_argument(
            "--explain", type=int, default=explain, help=f"{what} (default: %(default)s)"
        )


def _common(parser: argparse.ArgumentParser, run: object) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.set_defaults(run=run)


def _demo(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.demo import run_demo
    from captum_classfilters.cli.folder_job import check_number

    for name in ("epochs", "seed"):
        check_number(name, getattr(arguments, name))
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


def _explain(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.explain_folder import run_explain

    run_explain(_folder_job(arguments))
    return 0


def _decompose(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.smaller_folder import run_decompose

    run_decompose(_folder_job(arguments))
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.smaller_folder import run_prune

    run_prune(_folder_job(arguments), arguments.share)
    return 0


def _atlas(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.atlas_folder import run_atlas

    run_atlas(
        _folder_job(arguments),
        arguments.labels,
        arguments.compare,
        arguments.optimize,
        arguments.title,
    )
    return 0


def _folder_job(arguments: argparse.Namespace) -> "FolderJob":
    from captum_classfilters.cli.folder_job import FolderJob

    return FolderJob(
        model=arguments.model,
        data=arguments.data,
        layer=arguments.layer,
        output=arguments.output,
        checkpoint=arguments.checkpoint,
        random_weights=arguments.random_weights,
        methods=tuple(getattr(arguments, "method", ())),
        num_filters=arguments.num_filters,
        num_classes=arguments.num_classes,
        class_names=arguments.class_names,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        limit=arguments.limit,
        explain=getattr(arguments, "explain", 0),
        device=arguments.device,
        dtype=arguments.dtype,
        num_workers=arguments.num_workers,
        skip_broken=arguments.skip_broken,
        overwrite=arguments.overwrite,
        show_progress=not arguments.quiet,
    )


def _layers(arguments: argparse.Namespace) -> int:
    from captum_classfilters.cli.identify_folder import layer_table

    print(layer_table(arguments.model, arguments.image_size))
    return 0
