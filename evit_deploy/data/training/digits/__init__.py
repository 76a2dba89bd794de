"""Digit data sets that need no download: scikit-learn's digits, and the same digits on photographs."""
