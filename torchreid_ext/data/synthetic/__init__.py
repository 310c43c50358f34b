"""Data sets that are drawn on first use: pedestrians (images) and tracklets (video)."""
