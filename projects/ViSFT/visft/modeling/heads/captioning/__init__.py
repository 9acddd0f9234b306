"""Captioning, by an LSTM or a Transformer decoder."""
