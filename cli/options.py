"""Options and value types that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from ..config import ATTENTIONS, MISSING_IMAGES, ProtocolConfig
from ..errors import InputError

FOLDER = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
device_option = click.option("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:N.")
attention_option = click.option(
    "--attention",
    type=click.Choice(ATTENTIONS),
    help="How encoders compute attention. [auto: xformers on CUDA where it is installed, else torch's (sdpa)]",
)
missing_images_option = click.option(
    "--missing-images",
    type=click.Choice(MISSING_IMAGES),
    help="What to do about images that are missing or cannot be read. [error]",
)
k_option = click.option("--k", "ks", type=int, multiple=True, help="A cut-off of HR and NDCG; may be repeated. [10]")


def writable_file(_context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """A callback of options that take a file to be written: refused before the work rather than after it."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise InputError(f"{parameter.opts[0]}: expected a file in a folder that exists, found {file}")
    return file


out_option = click.option("--out", type=FOLDER, callback=writable_file, help="A JSON file for the result.")


def protocol_options(command):
    """--min-interactions and --max-inputs."""
    defaults = ProtocolConfig()
    command = click.option("--max-inputs", type=int, default=defaults.max_inputs, help="Items a history feeds in.")(
        command
    )
    return click.option(
        "--min-interactions", type=int, default=defaults.min_interactions, help="Users with fewer are dropped."
    )(command)


def torch_device(name: str):
    """The named torch device, or InputError where it, or the backend of the environment on it, is not to be had."""
    from .. import kernels

    device = _named_device(name)
    try:
        kernels.check_backend(device)
    except ValueError as error:
        raise InputError(str(error)) from None
    return device


def _named_device(name: str):
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: expected auto, cpu, cuda or cuda:N, found {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected auto, cpu, cuda or cuda:N, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
