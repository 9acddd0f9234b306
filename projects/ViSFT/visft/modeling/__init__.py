"""The model: the backbone, the heads, the losses on the tower itself, and the meta-architecture."""
