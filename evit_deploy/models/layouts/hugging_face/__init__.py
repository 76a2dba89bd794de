"""Layouts of Hugging Face transformers, one model a file."""
