"""The classes of a data set: their names, their numbers, and the words that a text encoder reads for them."""
