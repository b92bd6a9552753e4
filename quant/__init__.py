"""MXFP8 files and models: read, plan, convert, check, report. Independent of ComfyUI."""
