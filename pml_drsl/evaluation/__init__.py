"""Retrieval scores of features (mAP, mINP, CMC), re-ranking, and the command ``drsl-evaluate``."""
