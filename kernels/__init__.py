"""Triton kernels, one file an op. Installed as ``mbf.kernels``; imported only when a tensor on a GPU asks for one."""
