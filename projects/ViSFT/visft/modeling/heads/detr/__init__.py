"""Detection by DETR."""
