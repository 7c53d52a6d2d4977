"""`lingconv formats`: the families that are known."""

from lingconv.cli.common_options import DisplayFlags, Formats
from lingconv.cli.option_groups import grouped
from lingconv.cli.terminal import columns, terminal


@grouped
def formats(formats: Formats = None, *, printed: DisplayFlags) -> None:
    """List the model families, their architectures and the presets for `synth`."""
    from lingconv.model.family_file import load_families, presets  # what `--help` does without

    families = load_families(formats)
    lines: list[str] = []
    for family in families:
        lines += [f"{family.name}  {family.title}", *columns(family.architectures.items())]
    lines += ["presets", *(f"  {name}" for name in presets())]
    value = {
        "schema": "lingconv.formats/1",
        "families": {family.name: dict(family.architectures) for family in families},
        "presets": list(presets()),
    }
    terminal.result(lines, value, [family.name for family in families])
