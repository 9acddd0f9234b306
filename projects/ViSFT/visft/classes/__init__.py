"""The classes of a data set: their names, their indices, and the phrases that a text encoder reads for them."""
