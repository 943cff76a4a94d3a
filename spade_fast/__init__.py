"""SPADE: prune a trained network for one image, then explain the sparse trace that is left."""
