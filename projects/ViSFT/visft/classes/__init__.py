"""The classes of a data set: names, numbers, and words for a text encoder."""
