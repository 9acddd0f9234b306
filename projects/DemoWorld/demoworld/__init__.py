"""The demo world: rendered scenes in COCO format, and a small CLIP tower pretrained on emoji.

The emoji are OpenMoji's (https://openmoji.org). They are licensed CC BY-SA 4.0, and so is everything rendered from
them.
Importing this package is cheap, because open_clip is imported only when it is needed.
"""
