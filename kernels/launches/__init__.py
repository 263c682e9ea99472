"""Launches measured on one kind of card: a JSON file per card, read by `kernels/launch_files.py`. None is measured yet."""
