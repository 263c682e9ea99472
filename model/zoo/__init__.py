"""The default model: experts from package registries, joined by the bridge that is kept here."""
