"""The classes of lingconv's commands: Typer's, whose help shows no `<bool>` behind a switch."""

from typing import Any

from typer.core import TyperCommand, TyperGroup


class Command(TyperCommand):
    """A command."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, `--help` too; switches have no metavar."""
        return _without_values(super().get_params(ctx))


class Group(TyperGroup):
    """A command that has others below it."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, `--help` too; switches have no metavar."""
        return _without_values(super().get_params(ctx))


def _without_values(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
