"""The project's own small checkpoints: how they are made, and those that come with the package."""
