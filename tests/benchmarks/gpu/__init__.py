"""The parts of ``gpu_suite.py``: what one run on a GPU has to settle, most important first."""
