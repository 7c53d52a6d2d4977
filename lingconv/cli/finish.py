"""`lingconv finish`: a checkpoint of what parts have written."""

import lingconv
from lingconv.cli import convert
from lingconv.cli.common_options import Destination, DisplayFlags
from lingconv.cli.option_groups import grouped
from lingconv.cli.progress_display import make_progress


@grouped
def finish(destination: Destination, *, printed: DisplayFlags) -> None:
    """Check that all parts of a run are there, and write index and config.

    Example: `lingconv finish Ling-1T-FP8`, after `lingconv convert Ling-1T Ling-1T-FP8 --dtype fp8
    --part I/16` for each I, on as many machines
    """
    with make_progress() as progress:
        result = lingconv.api.finish(destination, progress=progress)
    convert.show(result)
