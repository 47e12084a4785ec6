"""Sparse models that run faster: the CPU kernel, the modules around it, quantisation and export."""
