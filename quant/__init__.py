"""MXFP8 files and models: read, plan, convert, verify, report. Knows nothing of ComfyUI."""
