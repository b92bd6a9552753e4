"""MXFP8 files in other programs: diffusers and transformers, MLX, a hub's model card.

Nothing else of the pack imports this folder but the command, so ComfyUI's users never need what
these modules do. It is imported as `mxfp8.integrations`: a `diffusers.py` in the root would hide
the library.
"""
