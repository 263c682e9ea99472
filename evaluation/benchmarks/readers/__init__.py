"""Readers of official annotation files, one per format: they yield rows, without looking for media files."""
