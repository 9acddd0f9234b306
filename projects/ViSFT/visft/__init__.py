"""ViSFT for detectron2: importing this package registers its backbones, heads, meta-architecture and data sets."""
