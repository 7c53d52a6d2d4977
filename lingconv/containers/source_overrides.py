"""What the user says of a checkpoint that its files do not, or say wrongly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceOverrides:
    """What the user says of a checkpoint: a config in place of its own, and single keys of it.

    `main_params` asks for the optimizer's FP32 weights.
    """

    config: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    main_params: bool = False
