"""Everything that needs a GPU to be known, in one run: python -m bench.gpu"""
