"""Scenes of things that no fine-tuning scene contains."""

import functools

import numpy as np

from demoworld import catalogue, scenes

# The names of these things have a regular plural.
_THINGS = (
    "🐒 🦍 🦊 🦁 🐅 🐆 🐖 🐪 🦘 🐇 🐿 🦔 🦇 🐼 🦥 🦨 🐓 🐧 🦅 🦢 🦩 🐸 🐊 "
    "🐢 🦎 🐍 🐳 🐬 🦈 🐙 🐌 🐛 🐜 🐝 🐞 🕷 🦂 🌹 🌻 🌷 🌵 🍄 🍉 🍋 🍍 🍐 "
    "🥥 🥑 🍆 🥒 🧅 🥐 🥨 🍔 🌮 🥚 🍪 🍭 🧁 🏠 ⛺ 🚁 🚀 🚜 ⚓ ⌚ ⭐ "
    "🎈 🏆 🎸 🎺 🎻 🥁 🔔 💡 🔦 🕯 🔑 🔨 🪓 🔧 ⚙ 🧲 🪜 🔬 🔭 🚪 🪞 🛁 🧹 🧺 "
    "🪣 👑 🎩 👗 💍 📷 🔋 ✏ 📌 🛡 🎲 🪀 🧭 🗿 ☎ "
).split()


@functools.cache
def cast() -> scenes.Cast:
    """Return the categories: one per emoji, with its name."""
    known = {emoji.text: emoji for emoji in catalogue.unseen_emoji()}
    return scenes.cast_of([(known[text].name, (text,)) for text in _THINGS if text in known])


TEST = 2
"""Number of the part that is the test split of the out-of-domain suite."""


def scene(part: int, number: int) -> scenes.Scene:
    """Return one scene, which depends only on its part and its number."""
    return scenes.compose(np.random.default_rng([7, part, number]), held_out=True, cast=cast())
