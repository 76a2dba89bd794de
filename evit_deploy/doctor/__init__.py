"""Diagnosis of the installation: what is installed, whether it loads, and how to fix it."""
