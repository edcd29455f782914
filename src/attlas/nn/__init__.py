"""Mixers: one file per family, all of them `attlas.nn.mixer.Mixer`."""
