"""Benchmarks and reports; the package never imports them."""
