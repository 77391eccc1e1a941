"""Options and value types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..config import ProtocolConfig
from ..errors import InputError
from ..files import expanded_path, refuse_irregular
from ..settings import changed_section
from .help_pages import DATA, OUTPUT, option
from .setting_options import given_settings, setting_options
from .verbosity import verbosity_options


class UserPath(click.Path):
    """A file or a folder, ~ at its beginning replaced by the home folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path. Raises InputError for the ~ of an unknown user."""
        return expanded_path(value)


class CheckedPath(click.Path):
    """A path that may be missing, but is not a file where a folder is expected, nor a folder where a file is."""

    def __init__(self, is_folder: bool) -> None:
        """Expect a folder or a file."""
        super().__init__(file_okay=not is_folder, dir_okay=is_folder, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path. Raises InputError, naming the option or argument, for one of the other kind."""
        name = param.opts[0] if isinstance(param, click.Option) else param.human_readable_name if param else "path"
        path = expanded_path(value)
        if self.file_okay and path.is_dir():
            raise InputError(f"{name}: expected a file, found the folder {value}")
        if self.dir_okay and path.exists() and not path.is_dir():
            raise InputError(f"{name}: expected a folder, found the file {value}")
        return path


FOLDER = CheckedPath(is_folder=True)
FILE = CheckedPath(is_folder=False)
FILE_OR_FOLDER = UserPath()

device_option = option(
    "--device",
    group=OUTPUT,
    default="auto",
    metavar="NAME",
    help="Device that computes: cpu, cuda, cuda:N, or auto (CUDA if there is one).",
)
protocol_options = setting_options(ProtocolConfig, DATA)
json_option = option("--json", "as_json", group=OUTPUT, is_flag=True, help="Print the figures as JSON.")


def output_options(command: Any) -> Any:
    """Give a command --json, --quiet and --verbose."""
    return json_option(verbosity_options(command))


def writable_file(_context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Return an option's file, links followed, if it can be written.

    Raises InputError, before any work is done, if it cannot, and for what a file must not replace, as /dev/stdout.
    """
    if file is None:
        return None
    if not file.absolute().parent.is_dir():
        raise InputError(f"{parameter.opts[0]}: expected a file in a folder that exists, found {file}")
    refuse_irregular(file)
    return file.resolve() if file.is_symlink() else file


out_option = option("--out", group=OUTPUT, type=FILE, callback=writable_file, help="JSON file for the result.")


def chosen_protocol(options: dict[str, Any]) -> ProtocolConfig:
    """Take the protocol's options out of `options` and return the protocol they describe."""
    return changed_section("protocol", ProtocolConfig, None, given_settings(options, ProtocolConfig))
