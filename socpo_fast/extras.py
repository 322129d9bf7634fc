"""Imports what extras of the package install, and says which extra is missing."""

from importlib import import_module
from types import ModuleType


def import_extra(where: str, module: str, *, extra: str) -> ModuleType:
    """Imports a module that only an extra of the package installs.

    Args:
        where: the setting or file that needs it; the error begins with it.

    Raises:
        ValueError: the package is not installed; the message has the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # Something that an installed package lacks is a fault of its installation, not a choice.
        if error.name != package:
            raise
        raise ValueError(
            f"{where} needs the package {package}, got none; pip install 'socpo_fast[{extra}]'"
        ) from None
