"""The demo world: rendered scenes in COCO format, and a small CLIP tower pretrained on emoji.

Images are OpenMoji's (https://openmoji.org), licensed CC BY-SA 4.0, and so is everything rendered from them. Importing
this package is cheap: open_clip is imported when it is needed.
"""
