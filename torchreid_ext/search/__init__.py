"""Uses a trained network: from a checkpoint to features, a search, a page or an exported file."""
