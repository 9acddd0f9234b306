"""Scenes of things that no fine-tuning scene shows."""

import functools

import numpy as np

from demoworld import catalogue, scenes

# Things whose name has a regular plural.
_THINGS = (
    "🐒 🦍 🦊 🦁 🐅 🐆 🐖 🐪 🦘 🐇 🐿 🦔 🦇 🐼 🦥 🦨 🐓 🐧 🦅 🦢 🦩 🐸 🐊 "
    "🐢 🦎 🐍 🐳 🐬 🦈 🐙 🐌 🐛 🐜 🐝 🐞 🕷 🦂 🌹 🌻 🌷 🌵 🍄 🍉 🍋 🍍 🍐 "
    "🥥 🥑 🍆 🥒 🧅 🥐 🥨 🍔 🌮 🥚 🍪 🍭 🧁 🏠 ⛺ 🚁 🚀 🚜 ⚓ ⌚ ⭐ "
    "🎈 🏆 🎸 🎺 🎻 🥁 🔔 💡 🔦 🕯 🔑 🔨 🪓 🔧 ⚙ 🧲 🪜 🔬 🔭 🚪 🪞 🛁 🧹 🧺 "
    "🪣 👑 🎩 👗 💍 📷 🔋 ✏ 📌 🛡 🎲 🪀 🧭 🗿 ☎ "
).split()


@functools.cache
def cast() -> scenes.Cast:
    """Who plays in the scenes: one category an emoji, under its own name."""
    known = {emoji.text: emoji for emoji in catalogue.unseen_emoji()}
    return scenes.cast_of([(known[text].name, (text,)) for text in _THINGS if text in known])


TEST = 2
"""Number of the part that the test split of the out-of-domain suite shows."""


def scene(part: int, number: int) -> scenes.Scene:
    """One scene, which depends on its part and its number alone."""
    return scenes.compose(np.random.default_rng([7, part, number]), held_out=True, cast=cast())
