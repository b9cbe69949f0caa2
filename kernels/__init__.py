"""Triton kernels, one operator a file; each shares name and signature with its twin in `acs_triton.reference`."""
