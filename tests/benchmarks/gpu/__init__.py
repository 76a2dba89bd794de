"""The parts of ``gpu_suite.py``, most important first."""
