"""Tests of a network: feature extraction, search in the gallery, scores and pictures."""
