"""Flamboyance, the few-shot inference server: the command `flamboyance`, which starts the programs of the application."""
