"""The commands that use a trained network: drsl-extract, drsl-search and drsl-export."""
