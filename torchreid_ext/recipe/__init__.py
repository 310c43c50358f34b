"""Parts of the strong re-identification baseline: the batch normalisation neck and the warm-up."""
