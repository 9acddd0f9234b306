"""Features as colours, compared with texts, and matched between images."""

from visft.visualization.feature_maps import (
    Components,
    colours,
    mutual_matches,
    principal_components,
    similarity_maps,
    value_range,
)

__all__ = [
    "Components",
    "colours",
    "mutual_matches",
    "principal_components",
    "similarity_maps",
    "value_range",
]
