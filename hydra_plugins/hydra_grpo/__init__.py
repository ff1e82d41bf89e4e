"""Launchers and sweepers of this project, where Hydra looks for them."""
