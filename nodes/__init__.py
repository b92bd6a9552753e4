"""The ComfyUI nodes: thin, over `quant` and `kernels`."""
