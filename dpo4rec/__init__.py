"""Teach a language model to write the user text that makes a recommender rank better."""

__version__ = "0.1.0"
