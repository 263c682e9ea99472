"""Models by name: repositories of a Hugging Face Hub and local folders, imported once into the cache."""
