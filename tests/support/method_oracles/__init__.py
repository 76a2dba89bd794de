"""The reduction methods in NumPy float64, one file a method, written from the papers.

Judges of the package's methods: plain, one image at a time, and no import from the package they judge.
"""
