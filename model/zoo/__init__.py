"""The default model: frozen experts from package registries, joined by the bridge in this folder."""
