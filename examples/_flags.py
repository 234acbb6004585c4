"""The flags of the self-supervised examples on digits, and their checks."""

from pathlib import Path

import torch
from _digits import TRAINING_IMAGES


def add_flags(parser, sizes, out):
    """Add a flag for each of `sizes` (name: default), and the flags that all examples on digits have."""
    add_sizes(parser, sizes)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default cpu")
    add_run_flags(parser, out)


def add_sizes(parser, sizes):
    """Add a flag for each of `sizes` (name: default)."""
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")


def add_run_flags(parser, out):
    """Add the flags of every example that draws a figure."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed; same seed, same run")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="PNG")


def parse(parser, quick, more=""):
    """The arguments. --quick sets the smaller defaults `quick` (name: value), and `more` that the example says."""
    sizes = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in quick.items())
    help_ = "; ".join(text for text in (f"defaults: {sizes}" if sizes else "", more) if text)
    parser.add_argument("--quick", action="store_true", help=f"a short run: {help_}")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def check_flags(parser, args, least):
    """Exit with a one-line error if a size is below its bound in `least` (name: bound), or another flag is invalid."""
    check_run_flags(parser, args, least)
    if args.batch > TRAINING_IMAGES:
        parser.error(f"--batch must not exceed the {TRAINING_IMAGES} training images, got {args.batch}.")
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {args.device!r}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU and a torch built for CUDA; none was found.")


def check_run_flags(parser, args, least):
    """The same for the flags that every example has."""
    for name, bound in least.items():
        if getattr(args, name) < bound:
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}, got {getattr(args, name)}.")
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed must be between 0 and 2**31 - 1, got {args.seed}.")
    if args.out.suffix != ".png":
        parser.error(f"--out must be the name of a .png file, got {args.out}.")


def judge(claims):
    """Print a line for each claim, (whether it holds, text); True if all hold."""
    for holds, text in claims:
        print(f"{'PASS' if holds else 'FAIL'}: {text}")
    return all(holds for holds, _ in claims)
