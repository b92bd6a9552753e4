"""MXFP8 for ComfyUI: load, run, convert and save MXFP8 models.

This folder is both a ComfyUI custom node pack and the importable package `mxfp8`. Everything is
imported inside the entry point, so that importing the package, or a header reader from it, costs
nothing and works without ComfyUI.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI calls this once at start-up and gets the pack's nodes."""
    import logging

    try:
        from .nodes.extension import MXFP8Extension
    except Exception:
        # ComfyUI prints the message of an entry point's error but no traceback.
        logging.getLogger(__name__).exception("MXFP8 nodes could not be loaded")
        raise
    return MXFP8Extension()
