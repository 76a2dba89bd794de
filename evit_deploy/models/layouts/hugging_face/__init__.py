"""Layouts of Hugging Face transformers, one model per file."""
