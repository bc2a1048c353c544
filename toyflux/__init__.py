"""The embedded base: `world` draws captioned pictures, `build` trains a tiny FLUX on them, `judge` reads pictures."""
