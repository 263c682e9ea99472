"""Launch files: a JSON file per kind of card, read by `kernels/launch_files.py`. No card has been measured yet."""
