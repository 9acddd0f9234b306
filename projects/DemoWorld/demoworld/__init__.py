"""The demo world: rendered scenes in COCO format, and the small CLIP tower pretrained on its images.

Images are OpenMoji's (https://openmoji.org), licensed CC BY-SA 4.0; what is rendered from
them is under the same licence.

Importing this package is cheap: open_clip is not imported before it is needed.
"""
