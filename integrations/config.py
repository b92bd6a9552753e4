"""What diffusers and transformers are told about an MXFP8 model: `MXFP8Config`.

Both have a base class for such configurations, with the same methods. This one has these methods
and no base, so one object serves both, and neither library needs the other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from enum import Enum

from ..kernels.dispatch import PRECISIONS


class Method(str, Enum):
    """The name under which both libraries know the quantizer."""

    MXFP8 = "mxfp8"


@dataclass
class MXFP8Config:
    """How an MXFP8 model is loaded.

    Attributes:
        precision: "exact" (stored weights times inputs as they are), "fast" (inputs are quantized,
            too) or "auto" (fast on GPUs that have tensor cores for it), as for `kernels.linear`. A
            model does not store it. A folder brings its own config, which both libraries prefer to
            a given one, so its model runs "auto"; `set_precision` changes it.
        modules_to_not_convert: the linear layers that are not MXFP8, written when a model is saved.
            Only diffusers before 0.37 needs it, to read a folder; else the file itself tells.

    Raises:
        ValueError: `precision` is none of these.
    """

    precision: str = "auto"
    modules_to_not_convert: list[str] | None = None

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"MXFP8Config: precision {self.precision!r}; it must be one of "
                f"{', '.join(PRECISIONS)}"
            )

    @property
    def quant_method(self) -> Method:
        return Method.MXFP8

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """From the entry `quantization_config` of a config.json; unknown fields are ignored."""
        names = {field.name for field in fields(cls)}
        given = {**config_dict, **kwargs}
        config = cls(**{key: value for key, value in given.items() if key in names})
        unused = {key: value for key, value in kwargs.items() if key not in names}
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        """That entry."""
        return {
            "quant_method": self.quant_method.value,
            "modules_to_not_convert": self.modules_to_not_convert,
        }

    to_diff_dict = to_dict

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def update(self, **kwargs) -> dict:
        """Set the fields that are given; returns the rest."""
        names = {field.name for field in fields(self)}
        for key in names & kwargs.keys():
            setattr(self, key, kwargs[key])
        return {key: value for key, value in kwargs.items() if key not in names}
