"""Nodes that keep a calibration in a file, and bring it back."""

from __future__ import annotations

from comfy_api.latest import io

from ..quant.conversion import calibration
from ..quant.reports.conversion import gigabytes
from .calibrating import CalibrationType
from .host import filenames, paths
from .host.progress import Progress, show
from .loading import CATEGORY


class MXFP8SaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8SaveCalibration",
            display_name="Save Calibration (MXFP8)",
            category=CATEGORY,
            description="Saves a calibration to output/, for later and for `mxfp8 convert`.",
            search_aliases=["mxfp8", "calibration", "save"],
            inputs=[
                CalibrationType.Input("calibration", tooltip="From Calibrate (MXFP8)."),
                io.String.Input(
                    "filename_prefix",
                    default=f"{paths.CALIBRATIONS}/mxfp8",
                    tooltip="Folder and name inside output/; the loader lists that folder.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, calibration, filename_prefix) -> io.NodeOutput:
        with paths.saving(filenames.check_name("filename_prefix", filename_prefix)) as path:
            calibration.save(path, progress=Progress(cls))
        text = f"{path.name}: {gigabytes(path.stat().st_size)}"
        show(cls, text)
        return io.NodeOutput(ui={"text": [text]})


class MXFP8LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MXFP8LoadCalibration",
            display_name="Load Calibration (MXFP8)",
            category=CATEGORY,
            description="Loads a calibration that Save Calibration (MXFP8) wrote.",
            search_aliases=["mxfp8", "calibration", "load"],
            inputs=[
                io.Combo.Input(
                    "calibration_name",
                    options=paths.list_calibrations(),
                    tooltip=f"A file in output/{paths.CALIBRATIONS}.",
                )
            ],
            outputs=[
                CalibrationType.Output(display_name="calibration", tooltip="As it was saved.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, calibration_name) -> io.NodeOutput:
        path = paths.calibration_path(calibration_name)
        return io.NodeOutput(calibration.load(path, Progress(cls)))
