"""Answers to images: a bundle that is opened once and asked as often as one likes."""
