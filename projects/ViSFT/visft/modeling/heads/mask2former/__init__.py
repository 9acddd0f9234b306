"""Instance segmentation by Mask2Former."""
