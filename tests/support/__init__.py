"""Shared test helpers: models, cases, servers, builds. Tests import from here and never from each other."""
