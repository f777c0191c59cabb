"""The small model's world: solid shapes that move before a plain background.

Endless and seeded: :mod:`scene` draws what happens, :mod:`render` its frames, :mod:`captions` what
is said about it.
"""
