"""The list of nodes that ComfyUI gets."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .accelerating import MXFP8Accelerate, MXFP8AccelerateTextEncoder
from .backend_report import MXFP8BackendReport
from .calibrating import MXFP8Calibrate, MXFP8LoadCalibration, MXFP8SaveCalibration
from .comparing import MXFP8CompareModels
from .inspecting import MXFP8InspectFile
from .loading import (
    MXFP8Load,
    MXFP8LoadCheckpoint,
    MXFP8LoadTextEncoder,
)
from .planning import MXFP8PlanConversion
from .quantizing import (
    MXFP8ConvertFile,
    MXFP8ConvertFiles,
    MXFP8Quantize,
    MXFP8QuantizeTextEncoder,
)
from .recommending import MXFP8Recommend
from .repairing import MXFP8RepairFile
from .saving import MXFP8SaveCheckpoint, MXFP8SaveModel, MXFP8SaveTextEncoder

NODES: list[type[io.ComfyNode]] = [
    MXFP8Load,
    MXFP8LoadCheckpoint,
    MXFP8LoadTextEncoder,
    MXFP8Accelerate,
    MXFP8AccelerateTextEncoder,
    MXFP8Calibrate,
    MXFP8SaveCalibration,
    MXFP8LoadCalibration,
    MXFP8Quantize,
    MXFP8QuantizeTextEncoder,
    MXFP8CompareModels,
    MXFP8SaveModel,
    MXFP8SaveTextEncoder,
    MXFP8SaveCheckpoint,
    MXFP8ConvertFile,
    MXFP8ConvertFiles,
    MXFP8PlanConversion,
    MXFP8RepairFile,
    MXFP8InspectFile,
    MXFP8BackendReport,
    MXFP8Recommend,
]


class MXFP8Extension(ComfyExtension):
    """MXFP8's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
