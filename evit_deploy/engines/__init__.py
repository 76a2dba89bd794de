"""Engines: options, build, plan files, and the audit of what was built."""
